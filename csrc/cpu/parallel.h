// Threads come from the pool that torch already runs: GOMP_parallel is looked up in the process on first use, so that
// there is never a second pool whose spinning workers fight the first. Nothing here links an OpenMP library.
#pragma once
#include <cstdint>

namespace fastattn {

using ThreadBody = void (*)(void* context, int thread);

// Runs body(context, 0 .. nthreads-1) on the pool and waits. nthreads <= 1 runs inline.
void run_threads(int nthreads, ThreadBody body, void* context);

// f(task, next) for every task, taken one by one from a shared counter; `next` is the task this thread will run after
// (tasks when there is none), known early so that f can prefetch for it. f must not depend on who runs it.
template <class F>
void parallel_for_ahead(int nthreads, int64_t tasks, F&& f) {
  if (tasks <= 0) return;
  if (nthreads > tasks) nthreads = static_cast<int>(tasks);
  if (nthreads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task, task + 1);
    return;
  }
  struct Shared {
    F& f;
    int64_t tasks;
    int64_t next;
    int64_t claim() {
      int64_t mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      return mine < tasks ? mine : tasks;
    }
  } shared{f, tasks, 0};
  run_threads(
      nthreads,
      [](void* context, int) {
        auto& s = *static_cast<Shared*>(context);
        for (int64_t task = s.claim(), next; task < s.tasks; task = next) {
          next = s.claim();
          s.f(task, next);
        }
      },
      &shared);
}

template <class F>
void parallel_for(int nthreads, int64_t tasks, F&& f) {
  parallel_for_ahead(nthreads, tasks, [&](int64_t task, int64_t) { f(task); });
}

// Scratch memory of the calling thread, 64-byte aligned, valid until the next call on this thread.
// Up to 64 MB stay with the thread; a larger block is handed out for one call and given back by the next.
void* thread_scratch(int64_t bytes);

}  // namespace fastattn
