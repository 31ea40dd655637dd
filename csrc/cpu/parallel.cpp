#include "parallel.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace fastattn {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GompThreadNum = int (*)();

struct Pool {
  GompParallel parallel = nullptr;
  GompThreadNum thread_num = nullptr;
  Pool() {
#ifdef __SANITIZE_THREAD__
    return;  // ThreadSanitizer does not see libgomp's barriers; threads of our own it does
#endif
    find(RTLD_DEFAULT);
    // torch is not loaded yet, or brings no OpenMP: a global libgomp is the one that a later import of torch reuses.
    if (parallel == nullptr)
      if (void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL)) find(library);
  }
  void find(void* where) {
    parallel = reinterpret_cast<GompParallel>(dlsym(where, "GOMP_parallel"));
    thread_num = reinterpret_cast<GompThreadNum>(dlsym(where, "omp_get_thread_num"));
    if (thread_num == nullptr) parallel = nullptr;
  }
};

struct Call {
  ThreadBody body;
  void* context;
  GompThreadNum thread_num;
};

struct Scratch {
  static constexpr int64_t kKept = 64 << 20;
  void* data = nullptr;
  int64_t bytes = 0;
  ~Scratch() { release(); }
  void release() {
    if (data != nullptr) std::free(data);
    data = nullptr;
    bytes = 0;
  }
};

}  // namespace

void run_threads(int nthreads, ThreadBody body, void* context) {
  if (nthreads <= 1) return body(context, 0);
  static const Pool pool;
  if (pool.parallel != nullptr) {
    Call call{body, context, pool.thread_num};
    pool.parallel(
        [](void* data) {
          auto& c = *static_cast<Call*>(data);
          c.body(c.context, c.thread_num());
        },
        &call, static_cast<unsigned>(nthreads), 0);
    return;
  }
  std::vector<std::thread> threads;
  for (int i = 1; i < nthreads; ++i) threads.emplace_back(body, context, i);
  body(context, 0);
  for (auto& t : threads) t.join();
}

void* thread_scratch(int64_t bytes) {
  static thread_local Scratch scratch;
  if (scratch.bytes < bytes || scratch.bytes > Scratch::kKept) {
    scratch.release();
    constexpr int64_t kHuge = 2 << 20;
    int64_t alignment = bytes >= kHuge ? kHuge : 4096;
    int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
    scratch.data = std::aligned_alloc(alignment, rounded);
    if (scratch.data == nullptr) throw std::bad_alloc();
    scratch.bytes = rounded;
#ifdef MADV_HUGEPAGE
    if (bytes >= kHuge) madvise(scratch.data, rounded, MADV_HUGEPAGE);
#endif
  }
  return scratch.data;
}

}  // namespace fastattn
