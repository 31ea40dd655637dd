// Threads come from the pool that torch already runs: GOMP_parallel is looked up in the process on first use, so that
// there is never a second pool whose spinning workers fight the first. Nothing here links an OpenMP library.
#pragma once
#include <atomic>
#include <cstdint>

namespace fastattn {

using ThreadBody = void (*)(void* context, int thread);

// Runs body(context, 0 .. nthreads-1) on the pool and waits. nthreads <= 1 runs inline.
void run_threads(int nthreads, ThreadBody body, void* context);

// f(task) for every task, taken one by one from a shared counter; f must not depend on who runs it.
template <class F>
void parallel_for(int nthreads, int64_t tasks, F&& f) {
  if (tasks <= 0) return;
  if (nthreads > tasks) nthreads = static_cast<int>(tasks);
  if (nthreads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  struct Shared {
    F& f;
    int64_t tasks;
    int64_t next;
  } shared{f, tasks, 0};
  run_threads(
      nthreads,
      [](void* context, int) {
        auto& s = *static_cast<Shared*>(context);
        for (;;) {
          int64_t task = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED);
          if (task >= s.tasks) return;
          s.f(task);
        }
      },
      &shared);
}

// Scratch memory of the calling thread, 64-byte aligned, valid until the next call on this thread.
// Up to 64 MB stay with the thread; a larger block is handed out for one call and given back by the next.
void* thread_scratch(int64_t bytes);

}  // namespace fastattn
