#include "clock.h"

#include <algorithm>
#include <cstring>

namespace emulator {

Clocks clocks;

void Clocks::reset(u32 threads) {
  last_a_ = last_b_ = last_ = nullptr;
  into_ = from_ = nullptr;
  if (threads != threads_) {
    for (Clock* c : all_) {
      delete[] c->of;
      delete c;
    }
    all_.clear();
    threads_ = threads;
  }
  free_ = all_;
}

Clock* Clocks::make() {
  if (free_.empty()) {
    all_.push_back(new Clock{0, new u32[threads_]});
    free_.push_back(all_.back());
  }
  Clock* c = free_.back();
  free_.pop_back();
  if (c == into_) into_ = nullptr;
  c->users = 1;
  return c;
}

Clock* Clocks::zero() {
  Clock* c = make();
  std::memset(c->of, 0, threads_ * sizeof(u32));
  return c;
}

Clock* Clocks::copy(const Clock* from) {
  Clock* c = make();
  std::memcpy(c->of, from->of, threads_ * sizeof(u32));
  return c;
}

void Clocks::drop(Clock* c) {
  if (--c->users == 0) free_.push_back(c);
}

// Threads that come to a barrier mostly have the same clock, which then needs to be joined once.
void Clocks::join(Clock* into, Clock* from, u32 id, u32 own) {
  if (into != into_ || from != from_) {
    for (u32 i = 0; i < threads_; ++i) into->of[i] = std::max(into->of[i], from->of[i]);
    share(from);
    if (from_ != nullptr) drop(from_);
    into_ = into, from_ = from;
  }
  into->of[id] = std::max(into->of[id], own);
}

// Threads that leave a barrier together have the same two clocks: the last answer is kept, with its arguments.
Clock* Clocks::acquire(Clock* a, Clock* b) {
  if (a == b) return a;
  if (a != last_a_ || b != last_b_) {
    forget();
    last_a_ = a, last_b_ = b;
    share(a), share(b);
    last_ = copy(a);
    for (u32 i = 0; i < threads_; ++i) last_->of[i] = std::max(last_->of[i], b->of[i]);
  }
  share(last_);
  drop(a);
  return last_;
}

void Clocks::forget() {
  if (last_ == nullptr) return;
  drop(last_a_), drop(last_b_), drop(last_);
  last_a_ = last_b_ = last_ = nullptr;
}

}  // namespace emulator
