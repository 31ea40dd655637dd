// Vector clocks, by which two accesses are known to be ordered or not (FastTrack, Flanagan and Freund 2009).
// A clock holds, per thread of the cluster, the newest epoch of that thread that its owner has seen through barriers and
// the like. Clocks are counted and never changed while shared: after a barrier all threads of a block have the same one,
// and each keeps its own component beside it.
#pragma once
#include <vector>

#include "numbers.h"

namespace emulator {

constexpr int kClockBits = 18;  // of an epoch: thread << kClockBits | clock
constexpr u32 kClockMask = (1u << kClockBits) - 1;

struct Clock {
  u32 users;
  u32* of;  // one per thread of the cluster
};

class Clocks {
 public:
  void reset(u32 threads);  // takes back every clock
  Clock* zero();            // one user
  Clock* copy(const Clock* from);
  static void share(Clock* c) { ++c->users; }
  void drop(Clock* c);
  // into = max(into, from), where `id` has reached `own`. Nobody may have acquired `into` yet.
  void join(Clock* into, Clock* from, u32 id, u32 own);
  // max(mine, other); the user of `mine` has that instead.
  Clock* acquire(Clock* mine, Clock* other);

 private:
  u32 threads_ = 0;
  std::vector<Clock*> all_, free_;
  Clock *last_a_ = nullptr, *last_b_ = nullptr, *last_ = nullptr;  // of acquire
  Clock *into_ = nullptr, *from_ = nullptr;                        // of join
  Clock* make();
  void forget();
};

extern Clocks clocks;

}  // namespace emulator
