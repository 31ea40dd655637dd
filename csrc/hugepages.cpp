// Memory for our own large outputs. glibc maps every block above 32 MB afresh and unmaps it at free, and gives smaller ones
// back too when they lie at the end of its heap: a fresh 64 MB output costs 16384 page faults, several times the work of a
// norm. Here outputs of 4 MB and more are aligned to 2 MB, marked for huge pages and kept for the next output of their size
// class, up to a bound (1 GiB, an eighth of the memory, or half of what the control group allows, whichever is least). torch
// returns a block through the DLPack deleter, from any thread.
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

#include "dlpack.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {
namespace {

constexpr int64_t kHugePage = 2 << 20;

struct Block {
  void* data;
  int64_t bytes;
};

// Eight classes per power of two, whole huge pages: at most an eighth of a block (of small ones, 2 MB) is unused, and
// neighbouring sizes share blocks.
int64_t size_class(int64_t bytes) {
  int64_t step = kHugePage;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

int64_t memory_bound() {
  int64_t bound = int64_t{1} << 30;
  int64_t physical = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  if (physical > 0 && physical / 8 < bound) bound = physical / 8;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/memory.max", "r")) {
    long long limit = 0;
    if (std::fscanf(file, "%lld", &limit) == 1 && limit / 2 < bound) bound = limit / 2;
    std::fclose(file);
  }
  return bound;
}

class Cache {
 public:
  // A block of at least `bytes`, or null data when the system has none left.
  Block take(int64_t bytes) {
    int64_t wanted = size_class(bytes);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = free_.size(); i-- > 0;)
        if (free_[i].bytes == wanted) {
          Block block = free_[i];
          free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
          cached_ -= block.bytes;
          return block;
        }
    }
    void* data = map(wanted);
    if (data == nullptr) {
      release_all();
      data = map(wanted);
    }
    return {data, wanted};
  }

  // Keeps the block, giving the oldest ones back to the system beyond the bound.
  void give(Block block) {
    std::vector<Block> evicted;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(block);
      cached_ += block.bytes;
      while (cached_ > (enabled ? bound : 0)) {
        evicted.push_back(free_.front());
        cached_ -= free_.front().bytes;
        free_.erase(free_.begin());
      }
    }
    for (Block& b : evicted) munmap(b.data, static_cast<size_t>(b.bytes));
  }

  int64_t release_all() {
    std::vector<Block> blocks;
    int64_t bytes;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      blocks.swap(free_);
      bytes = cached_;
      cached_ = 0;
    }
    for (Block& b : blocks) munmap(b.data, static_cast<size_t>(b.bytes));
    return bytes;
  }

  int64_t cached() {
    std::lock_guard<std::mutex> lock(mutex_);
    return cached_;
  }

  bool enabled = true;
  int64_t bound = memory_bound();

 private:
  // Maps `bytes` at a 2 MB boundary: maps more and cuts both ends.
  static void* map(int64_t bytes) {
    size_t total = static_cast<size_t>(bytes + kHugePage);
    void* mapped = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(mapped);
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage);
    if (aligned != begin) munmap(begin, static_cast<size_t>(aligned - begin));
    if (char *end = aligned + bytes, *mapped_end = begin + total; end != mapped_end)
      munmap(end, static_cast<size_t>(mapped_end - end));
#ifdef MADV_HUGEPAGE
    madvise(aligned, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
    return aligned;
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // oldest first
  int64_t cached_ = 0;
};

// Never destroyed: tensors may outlive the module.
Cache& cache() {
  static Cache* instance = new Cache;
  return *instance;
}

struct Owner {
  DLManagedTensorVersioned managed;
  Block block;
  int64_t shape[View::kMaxDims], stride[View::kMaxDims];
};

}  // namespace

bool wants_huge(int64_t bytes) { return bytes >= kHugeTensorBytes && cache().enabled && bytes <= cache().bound; }

PyObject* empty_huge_tensor(int ndim, const int64_t* shape, Dtype dtype, const int64_t* stride) {
  int64_t bytes = size_of(dtype);
  for (int i = 0; i < ndim; ++i) bytes *= shape[i];
  Block block = cache().take(bytes);
  if (block.data == nullptr) return nullptr;
  auto* owner = new Owner{};
  owner->block = block;
  int64_t contiguous = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    owner->shape[i] = shape[i];
    owner->stride[i] = stride != nullptr ? stride[i] : contiguous;
    contiguous *= shape[i];
  }
  DLManagedTensorVersioned& m = owner->managed;
  m.version = {1, 0};
  m.manager_ctx = owner;
  m.deleter = [](DLManagedTensorVersioned* self) {
    auto* o = static_cast<Owner*>(self->manager_ctx);
    cache().give(o->block);
    delete o;
  };
  m.dl_tensor = {block.data, {1, 0}, ndim, dlpack_dtype(dtype), owner->shape, owner->stride, 0};
  if (poisons_outputs()) std::memset(block.data, 0xff, static_cast<size_t>(bytes));
  return to_python(&m);
}

void bind_hugepages(py::module_& m) {
  m.def(
      "set_hugepages",
      [](bool on) {
        cache().enabled = on;
        if (!on) cache().release_all();
      },
      "Whether outputs of 4 MB and more come from the cache of huge pages.");
  m.def("hugepages", [] { return cache().enabled; });
  m.def("hugepage_threshold", [] { return kHugeTensorBytes; });
  m.def("hugepage_bound", [] { return cache().bound; }, "How many bytes the cache keeps at most.");
  m.def("set_hugepage_bound", [](int64_t bytes) { cache().bound = bytes; });
  m.def("cached_hugepage_bytes", [] { return cache().cached(); });
  m.def("release_hugepages", [] { return cache().release_all(); }, "Gives the cached blocks back; returns their bytes.");
}

}  // namespace fastattn
