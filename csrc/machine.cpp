// What this machine can attain, for the benchmarks: multiply-add rate, copy and read bandwidth, on torch's threads.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <chrono>
#include <cstring>
#include <new>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace fastattn {
void bind_dispatch(py::module_& m);

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// GFLOP/s of all threads together over about `seconds`.
double fma_peak(const std::string& dtype, double seconds, int nthreads) {
  if (dtype != "fp32" && dtype != "bf16") throw py::value_error("fma_peak: dtype must be 'fp32' or 'bf16', got '" + dtype + "'");
  if (nthreads < 1) throw py::value_error("fma_peak: num_threads must be at least 1");
  py::gil_scoped_release release;
  struct Slot {
    double flops = 0;
    char pad[56];
  };
  struct Run {
    bool bf16;
    double seconds;
    Slot slots[256];
  } run{dtype == "bf16", seconds, {}};
  if (nthreads > 256) nthreads = 256;
  auto body = [](void* context, int thread) {
    auto& r = *static_cast<Run*>(context);
    double end = now() + r.seconds;
    do r.slots[thread].flops += kernels().fma_flops(r.bf16, 2000);
    while (now() < end);
  };
  double start = now();
  run_threads(nthreads, body, &run);
  double elapsed = now() - start, flops = 0;
  for (int i = 0; i < nthreads; ++i) flops += run.slots[i].flops;
  return flops / elapsed / 1e9;
}

struct Buffer {
  char* data;
  size_t bytes;
  explicit Buffer(size_t n) : bytes((n + (2 << 20) - 1) >> 21 << 21) {
    data = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (data == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    std::memset(data, 1, bytes);
  }
  ~Buffer() { munmap(data, bytes); }
};

// Four lines at a time from two places, fetched well ahead: what a reader that never waits for itself can reach.
uint64_t stream_read(const char* from, size_t n) {
  typedef uint64_t v8 __attribute__((vector_size(64), aligned(64)));
  v8 sum[4] = {};
  size_t half = n / 2 / 128 * 128;
  for (size_t i = 0; i < half; i += 128) {
    for (int stream = 0; stream < 2; ++stream) {
      const char* at = from + stream * half + i;
      __builtin_prefetch(at + 2048);
      __builtin_prefetch(at + 2112);
      sum[2 * stream] ^= *reinterpret_cast<const v8*>(at);
      sum[2 * stream + 1] ^= *reinterpret_cast<const v8*>(at + 64);
    }
  }
  v8 all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  uint64_t s = 0;
  for (int i = 0; i < 8; ++i) s ^= all[i];
  return s;
}

// GB/s, the best of seven times all `ways` of pass(way, begin, end), each over `bytes` split among the threads.
template <class Pass>
double best_rate(int64_t bytes, int nthreads, int ways, double moved, Pass pass) {
  constexpr int64_t kChunk = 1 << 15;
  int64_t chunks = bytes / kChunk, per_thread = (chunks + nthreads - 1) / nthreads;
  double best = 0;
  for (int i = 0; i < 7 * ways; ++i) {
    double start = now();
    parallel_for(nthreads, nthreads, [&](int64_t t) {
      int64_t begin = t * per_thread * kChunk, end = begin + per_thread * kChunk;
      if (end > chunks * kChunk) end = chunks * kChunk;
      if (begin < end) pass(i / 7, begin, end);
    });
    double rate = moved * static_cast<double>(chunks * kChunk) / (now() - start) / 1e9;
    if (rate > best) best = rate;
  }
  return best;
}

void check_bandwidth(int64_t bytes, int nthreads) {
  if (bytes < (1 << 16)) throw py::value_error("bandwidth: nbytes must be at least 65536");
  if (nthreads < 1) throw py::value_error("bandwidth: num_threads must be at least 1");
}

double copy_bandwidth(int64_t bytes, int nthreads) {
  check_bandwidth(bytes, nthreads);
  py::gil_scoped_release release;
  Buffer source(bytes), target(bytes);
  struct Way {
    bool around_cache;
    int64_t ahead;
  };
  constexpr Way kWays[] = {{true, 0}, {true, 2 << 10}, {true, 8 << 10}, {false, 0}};
  return best_rate(bytes, nthreads, 4, 2, [&](int way, int64_t begin, int64_t end) {
    kernels().copy_bytes(target.data + begin, source.data + begin, end - begin, kWays[way].around_cache, kWays[way].ahead);
  });
}

double read_bandwidth(int64_t bytes, int nthreads) {
  check_bandwidth(bytes, nthreads);
  py::gil_scoped_release release;
  Buffer source(bytes);
  uint64_t sink = 0;
  return best_rate(bytes, nthreads, 1, 1, [&](int, int64_t begin, int64_t end) {
    __atomic_fetch_xor(&sink, stream_read(source.data + begin, end - begin), __ATOMIC_RELAXED);
  });
}

}  // namespace

void bind_machine(py::module_& m) {
  bind_dispatch(m);
  m.attr("compiler") = __VERSION__;
  m.def("fma_peak", &fma_peak, py::arg("dtype"), py::arg("seconds") = 0.002, py::arg("num_threads") = 1,
        "Multiply-add rate in GFLOP/s: 'fp32', or 'bf16' (dot products where the CPU has them).");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("nbytes"), py::arg("num_threads") = 1,
        "Copy in GB/s, read plus write: the fastest of several ways, around the cache and through it.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("nbytes"), py::arg("num_threads") = 1, "Read in GB/s.");
}

}  // namespace fastattn
