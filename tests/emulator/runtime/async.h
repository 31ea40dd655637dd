// Operations that end later than the instruction that starts them, and their place in the order of things: what an engine
// (TMA, wgmma) does has a component of the vector clocks of its own. The one who waits for the operation gets that
// component; whoever only saw that the data had come has no order with it.
#pragma once
#include <functional>

#include "state.h"

namespace emulator {

void reset_async();  // before a cluster
// Ends one operation under way, if any; when no thread can run. True: something changed.
bool land_something();
void land_early();  // the same now and then, with some seeds
void land_at_exit(Fibre* f);
std::string waiting_detail(const Fibre& f);  // for reports

// A component of the clocks for the operations of `name`, told of in reports.
u32 new_engine(const char* name, Pc pc);
std::string engine_name(u32 engine);
inline u32 engine_epoch(u32 engine, u32 count, Pc pc) {
  if (count > kClockMask) fail_here(pc, "too many asynchronous operations for the emulator");
  return engine << kClockBits | count;
}
// The running thread has waited for the operations of that engine up to `count`.
void see_engine(u32 engine, u32 count);

// Starts an operation that `land` ends.
void start(std::function<void()> land);

// mbarrier.cpp
struct Mbarrier {
  u32 count, pending;  // arrivals of a phase, those that are missing
  i64 bytes;           // that are expected and have not come
  u32 phase;
  u32 engine;
  bool fenced;  // the engines may see its initialisation
  Fibre* maker;
  Pc pc;
  Clock *clock, *done;  // of the current phase, of the one before
  struct Waiter {
    Fibre* fibre;
    u32 parity;
    bool soft;  // may be told "not yet"
  };
  std::vector<Waiter> waiters;
};
Mbarrier& mbarrier_at(u64 offset, const char* verb, Pc pc);
void bytes_arrive(u64 offset, u32 bytes, u32 phase, Pc pc);
void reset_mbarriers();
bool release_polls();  // threads in try_wait are told "not yet"; false: that would change nothing
void barriers_are_fenced(Fibre* maker);

// tma.cpp
void stores_at_exit(Fibre* f);
void reset_stores();

// wgmma.cpp
void reset_products();
void products_at_exit(Fibre* f);

// copy.cpp
void copies_land_at_exit(Fibre& f);

// cluster.cpp
void registers_at_exit();
void reset_cluster();
void cluster_exits();
void must_have_started(u32 rank, const char* verb, Pc pc);

}  // namespace emulator
