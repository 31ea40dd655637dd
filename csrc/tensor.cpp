#include "tensor.h"

#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

namespace py = pybind11;

namespace fastattn {
namespace {

const DLPackExchangeAPI* exchange = nullptr;
bool poison = false;

Dtype dtype_of(DLDataType t) {
  if (t.lanes != 1) return Dtype::other;
  if (t.code == 2) return t.bits == 32 ? Dtype::f32 : t.bits == 16 ? Dtype::f16 : t.bits == 64 ? Dtype::f64 : Dtype::other;
  if (t.code == 4 && t.bits == 16) return Dtype::bf16;
  if (t.code == 6 && t.bits == 8) return Dtype::boolean;
  if (t.code == 0) return t.bits == 32 ? Dtype::i32 : t.bits == 64 ? Dtype::i64 : Dtype::other;
  return Dtype::other;
}

View view_by_attributes(PyObject* object) {
  py::handle tensor(object);
  static const char* kNames[] = {"torch.float32", "torch.bfloat16", "torch.float16", "torch.bool",
                                 "torch.int32",   "torch.int64",    "torch.float64"};
  View v;
  try {
    if (tensor.attr("device").attr("type").cast<std::string>() != "cpu") throw py::type_error("fastattn: expected a CPU tensor");
    v.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    py::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
    v.ndim = static_cast<int>(shape.size());
    if (v.ndim > View::kMaxDims) throw py::type_error("fastattn: a tensor has too many dimensions");
    for (int i = 0; i < v.ndim; ++i) {
      v.shape[i] = shape[i].cast<int64_t>();
      v.stride[i] = stride[i].cast<int64_t>();
    }
    std::string name = py::str(tensor.attr("dtype"));
    for (int i = 0; i < 7; ++i)
      if (name == kNames[i]) v.dtype = static_cast<Dtype>(i);
  } catch (py::error_already_set&) {
    throw py::type_error("fastattn: expected a strided CPU tensor");
  }
  return v;
}

// A view of what the exchange API tells; false when it is not a CPU tensor of few enough dimensions.
bool describe(const DLTensor& t, View* out) {
  if (t.device.device_type != 1 || t.ndim > View::kMaxDims) return false;
  out->data = static_cast<char*>(t.data) + t.byte_offset;
  out->ndim = t.ndim;
  out->dtype = dtype_of(t.dtype);
  int64_t contiguous = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    out->shape[i] = t.shape[i];
    out->stride[i] = t.strides != nullptr ? t.strides[i] : contiguous;
    contiguous *= t.shape[i];
  }
  return true;
}

}  // namespace

DLDataType dlpack_dtype(Dtype t) {
  switch (t) {
    case Dtype::f32:
      return {2, 32, 1};
    case Dtype::bf16:
      return {4, 16, 1};
    case Dtype::f16:
      return {2, 16, 1};
    case Dtype::boolean:
      return {6, 8, 1};
    case Dtype::i32:
      return {0, 32, 1};
    case Dtype::f64:
      return {2, 64, 1};
    default:
      return {0, 64, 1};
  }
}

bool poisons_outputs() { return poison; }

PyObject* to_python(DLManagedTensorVersioned* managed) {
  void* object = nullptr;
  if (exchange->managed_tensor_to_py_object_no_sync(managed, &object) != 0) throw py::error_already_set();
  return static_cast<PyObject*>(object);
}

View view_of(PyObject* object) {
  if (exchange == nullptr) return view_by_attributes(object);
  DLTensor t;
  if (exchange->dltensor_from_py_object_no_sync(object, &t) != 0) throw py::error_already_set();
  View v;
  if (!describe(t, &v)) throw py::type_error("fastattn: expected a CPU tensor of at most 8 dimensions");
  return v;
}

bool try_view(PyObject* object, View* out) {
  DLTensor t;
  if (exchange == nullptr || object == Py_None) return false;
  if (exchange->dltensor_from_py_object_no_sync(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  return describe(t, out);
}

bool try_address(PyObject* object, void** data, DLDevice* device) {
  DLTensor t;
  if (exchange == nullptr) return false;
  if (exchange->dltensor_from_py_object_no_sync(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  *data = static_cast<char*>(t.data) + t.byte_offset;
  *device = t.device;
  return true;
}

PyObject* empty_tensor(int ndim, const int64_t* shape, Dtype dtype, const int64_t* stride) {
  if (exchange == nullptr) return nullptr;
  int64_t bytes = size_of(dtype);
  for (int i = 0; i < ndim; ++i) bytes *= shape[i];
  if (wants_huge(bytes))
    if (PyObject* huge = empty_huge_tensor(ndim, shape, dtype, stride)) return huge;
  DLTensor prototype = {nullptr, {1, 0}, ndim, dlpack_dtype(dtype), const_cast<int64_t*>(shape), nullptr, 0};
  DLManagedTensorVersioned* managed = nullptr;
  std::string message;
  auto set_error = [](void* ctx, const char*, const char* text) { *static_cast<std::string*>(ctx) = text; };
  if (exchange->managed_tensor_allocator(&prototype, &managed, &message, set_error) != 0)
    throw std::runtime_error("fastattn: cannot allocate an output: " + message);
  // torch reads the strides when it wraps the tensor, and keeps no pointer to them.
  if (stride != nullptr) managed->dl_tensor.strides = const_cast<int64_t*>(stride);
  if (poison) std::memset(managed->dl_tensor.data, 0xff, static_cast<size_t>(bytes));
  return to_python(managed);
}

void bind_tensor(py::module_& m) {
  m.def("set_exchange_api", [](py::object capsule) {
    exchange = nullptr;
    if (capsule.is_none()) return;
    auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->version.major == 1 && api->dltensor_from_py_object_no_sync != nullptr) exchange = api;
  });
  m.def("has_exchange_api", [] { return exchange != nullptr; });
  m.def(
      "empty",
      [](const std::vector<int64_t>& shape, int dtype, const std::vector<int64_t>& stride) {
        return py::reinterpret_steal<py::object>(
            empty_tensor(static_cast<int>(shape.size()), shape.data(), static_cast<Dtype>(dtype), stride.data()));
      },
      "An uninitialised CPU tensor, of huge pages when it is large. Needs the exchange API.");
  m.def("poison_outputs", [](bool on) { poison = on; }, "For tests: every output starts full of NaN.");
}

}  // namespace fastattn
