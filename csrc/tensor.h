// A tensor as the kernels' doors see it: pointer, shape, strides in elements, dtype. No torch headers, no torch library:
// torch hands out a C function table (DLPack's exchange API); where it has none, the tensor's Python attributes are read.
#pragma once
#include <Python.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.h"

namespace fastattn {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, boolean = 3, i32 = 4, i64 = 5, f64 = 6, other = 7 };

inline int64_t size_of(Dtype t) {
  switch (t) {
    case Dtype::f32:
    case Dtype::i32:
      return 4;
    case Dtype::bf16:
    case Dtype::f16:
      return 2;
    case Dtype::boolean:
      return 1;
    default:
      return 8;
  }
}

struct View {
  static constexpr int kMaxDims = 8;
  void* data = nullptr;
  int ndim = 0;
  Dtype dtype = Dtype::other;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  explicit operator bool() const { return ndim > 0 || data != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

// Reads a CPU tensor. Throws pybind11::type_error when `object` is not one.
View view_of(PyObject* object);

// The same for code that has another road: false when `object` cannot be read through the exchange API as a CPU tensor.
// `object` must be a torch.Tensor or None.
bool try_view(PyObject* object, View* out);

// The address of a tensor's first element, and where it lies as DLPack numbers devices; false as above.
bool try_address(PyObject* object, void** data, DLDevice* device);

// A new uninitialised CPU tensor, contiguous unless strides are given: of huge pages when it is large (hugepages.cpp), else
// from torch's allocator. Null when torch has no exchange API.
PyObject* empty_tensor(int ndim, const int64_t* shape, Dtype dtype, const int64_t* stride = nullptr);

// The part of empty_tensor for `wants_huge(bytes)`; null when the system has no memory left.
constexpr int64_t kHugeTensorBytes = 4 << 20;
bool wants_huge(int64_t bytes);
PyObject* empty_huge_tensor(int ndim, const int64_t* shape, Dtype dtype, const int64_t* stride);

// True when tests asked for outputs full of NaN instead of uninitialised ones.
bool poisons_outputs();
DLDataType dlpack_dtype(Dtype dtype);
PyObject* to_python(DLManagedTensorVersioned* managed);

void bind_tensor(pybind11::module_& m);

}  // namespace fastattn

namespace pybind11::detail {
// Lets a bound function take `View` for a tensor and an empty View for None.
template <>
struct type_caster<fastattn::View> {
  PYBIND11_TYPE_CASTER(fastattn::View, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    if (!source.is_none()) value = fastattn::view_of(source.ptr());
    return true;
  }
};
}  // namespace pybind11::detail
