// Loads compiled kernels and launches them: values from Python objects, packed as the kernel's parameter struct lies.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../tensor.h"
#include "driver.h"
#include "tensor_map.h"

namespace py = pybind11;

namespace fastattn {
namespace {

using namespace cuda;

constexpr size_t kMaxParams = 4096;  // bytes: what every driver takes
constexpr int kPortableCluster = 8;

enum class Kind { i32, u32, i64, u64, f32, pointer, map };

struct Field {
  std::string name;
  Kind kind;
  size_t offset;
};

// One kernel on one device. Never unloaded: Python keeps it as long as the kernel, which lasts as long as the process.
struct Loaded {
  const Driver* driver;
  Context context;
  Function function;
  std::string label;
  int device;
  unsigned threads, shared, cluster;
  size_t bytes;
  std::vector<Field> fields;
};

[[noreturn]] void fail(const Loaded& k, const std::string& what) { throw std::runtime_error("fastattn: " + k.label + ": " + what); }

[[noreturn]] void fail_at(const Loaded& k, const Field& field, const std::string& what) {
  throw py::type_error("fastattn: " + k.label + ": " + field.name + " " + what);
}

void check(const Loaded& k, Result status, const char* call) {
  if (status != 0) fail(k, std::string(call) + " failed with " + words(*k.driver, status));
}

// While it lives, what would break the capture of a CUDA graph elsewhere (loading allocates memory) is allowed here.
class Relaxed {
 public:
  explicit Relaxed(const Driver& d) : driver_(d) { driver_.ThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { driver_.ThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kRelaxed;
};

Kind kind_of(const std::string& name) {
  static const char* kNames[] = {"i32", "u32", "i64", "u64", "f32", "pointer", "map"};  // as fastattn/runtime/params.py has them
  for (int i = 0; i < 7; ++i)
    if (name == kNames[i]) return static_cast<Kind>(i);
  throw std::runtime_error("fastattn: no field of a kernel's parameters is of kind " + name);
}

Module load_module(const Loaded& k, const std::string& image) {
  char log[4096] = "";
  int options[] = {kErrorLog, kErrorLogBytes};
  void* values[] = {log, reinterpret_cast<void*>(sizeof(log))};
  Module module = nullptr;
  Result status = k.driver->ModuleLoadDataEx(&module, image.c_str(), 2, options, values);
  if (status == 0) return module;
  int version = 0;
  k.driver->DriverGetVersion(&version);
  fail(k, "cuModuleLoadDataEx failed with " + words(*k.driver, status) + "; the driver serves CUDA " +
              std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) + (log[0] ? std::string("\n") + log : ""));
}

Loaded load_kernel(const py::bytes& image, const std::string& name, const std::string& label, int device, unsigned threads,
                   unsigned shared, unsigned cluster, size_t bytes,
                   const std::vector<std::tuple<std::string, std::string, size_t>>& fields) {
  Loaded k = {&driver(), nullptr, nullptr, label, device, threads, shared, cluster, bytes, {}};
  for (const auto& [field, kind, offset] : fields) k.fields.push_back({field, kind_of(kind), offset});
  if (bytes > kMaxParams) fail(k, "its parameters take " + std::to_string(bytes) + " bytes, 4096 fit");
  const Driver& d = *k.driver;
  Device handle = 0;
  check(k, d.DeviceGet(&handle, device), "cuDeviceGet");
  check(k, d.DevicePrimaryCtxRetain(&k.context, handle), "cuDevicePrimaryCtxRetain");
  Current current(d, k.context);
  Relaxed relaxed(d);
  Module module = load_module(k, image);
  check(k, d.ModuleGetFunction(&k.function, module, name.c_str()), "cuModuleGetFunction");
  if (shared > 0) check(k, d.FuncSetAttribute(k.function, kMaxDynamicShared, static_cast<int>(shared)), "cuFuncSetAttribute");
  if (cluster > kPortableCluster) check(k, d.FuncSetAttribute(k.function, kNonPortableCluster, 1), "cuFuncSetAttribute");
  return k;
}

bool is_tensor(PyObject* object) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> type;
  type.call_once_and_store_result([] { return py::object(py::module_::import("torch").attr("Tensor")); });
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(type.get_stored().ptr()));
}

// The address of a tensor on the kernel's device.
void* address_of(const Loaded& k, const Field& field, PyObject* tensor) {
  constexpr int kDLCPU = 1, kDLCUDA = 2;
  if (!is_tensor(tensor)) fail_at(k, field, "must be a tensor or None, got " + py::repr(tensor).cast<std::string>());
  py::handle t(tensor);
  void* data;
  DLDevice device;
  bool on_gpu, on_cpu;
  if (try_address(tensor, &data, &device)) {
    on_gpu = device.device_type == kDLCUDA && device.device_id == k.device;
    on_cpu = device.device_type == kDLCPU;
  } else {  // a torch without the exchange API, or a tensor that it does not describe
    on_gpu = t.attr("is_cuda").cast<bool>() && t.attr("get_device")().cast<int>() == k.device;
    on_cpu = t.attr("is_cpu").cast<bool>();
    data = on_gpu || on_cpu ? PyLong_AsVoidPtr(t.attr("data_ptr")().ptr()) : nullptr;
  }
  if (!on_gpu && !(on_cpu && k.driver->host_memory)) fail_at(k, field, "must be a tensor on cuda:" + std::to_string(k.device));
  return data;
}

template <class T>
void put(char* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

template <class T>
void put_integer(const Loaded& k, const Field& field, char* to, PyObject* value) {
  long long wide;
  if constexpr (std::is_same_v<T, uint64_t>) {
    auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value));
    wide = index ? static_cast<long long>(PyLong_AsUnsignedLongLong(index.ptr())) : -1;
  } else {
    wide = PyLong_AsLongLong(value);
  }
  bool failed = wide == -1 && PyErr_Occurred();
  if (failed) PyErr_Clear();
  if constexpr (sizeof(T) == 4) failed = failed || wide < std::numeric_limits<T>::min() || wide > std::numeric_limits<T>::max();
  if (failed) fail_at(k, field, "must be an integer that its type holds, got " + py::repr(value).cast<std::string>());
  put(to, static_cast<T>(wide));
}

void put_value(const Loaded& k, const Field& field, char* to, PyObject* value) {
  switch (field.kind) {
    case Kind::i32:
      return put_integer<int32_t>(k, field, to, value);
    case Kind::u32:
      return put_integer<uint32_t>(k, field, to, value);
    case Kind::i64:
      return put_integer<int64_t>(k, field, to, value);
    case Kind::u64:
      return put_integer<uint64_t>(k, field, to, value);
    case Kind::f32: {
      double real = PyFloat_AsDouble(value);
      if (real == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        fail_at(k, field, "must be a number, got " + py::repr(value).cast<std::string>());
      }
      return put(to, static_cast<float>(real));
    }
    case Kind::pointer:
      return put(to, value == Py_None ? nullptr : address_of(k, field, value));
    case Kind::map: {
      if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 5) fail_at(k, field, "must be a TensorMap");
      return encode(*k.driver, value, address_of(k, field, PyTuple_GET_ITEM(value, 0)), new (to) TensorMap);
    }
  }
}

unsigned dimension(const Loaded& k, const py::tuple& grid, size_t i) {
  long long n = PyLong_AsLongLong(PyTuple_GET_ITEM(grid.ptr(), i));
  if (n == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (n < 1 || n > (i == 0 ? 0x7fffffffLL : 65535LL))
    fail(k, "its grid must be at most 2^31-1 × 65535 × 65535 blocks, got " + py::repr(grid).cast<std::string>());
  return static_cast<unsigned>(n);
}

void launch_kernel(const Loaded& k, uintptr_t stream, const py::tuple& grid, const py::object& values) {
  auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(values.ptr(), "fastattn: values must be a sequence"));
  if (!sequence) throw py::error_already_set();
  size_t count = static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()));
  if (count != k.fields.size())
    fail(k, "its parameters have " + std::to_string(k.fields.size()) + " fields, got " + std::to_string(count) + " values");
  if (grid.size() != 3) fail(k, "its grid must have three dimensions, got " + py::repr(grid).cast<std::string>());
  Current current(*k.driver, k.context);  // encoding tensor maps asks for a context too, and a new thread has none
  alignas(64) char params[kMaxParams];
  std::memset(params, 0, k.bytes);
  for (size_t i = 0; i < count; ++i)
    put_value(k, k.fields[i], params + k.fields[i].offset, PySequence_Fast_GET_ITEM(sequence.ptr(), i));

  LaunchAttribute cluster = {};
  cluster.id = kLaunchAttributeCluster;
  cluster.cluster = {k.cluster, 1, 1};
  LaunchConfig config = {dimension(k, grid, 0),
                         dimension(k, grid, 1),
                         dimension(k, grid, 2),
                         k.threads,
                         1,
                         1,
                         k.shared,
                         reinterpret_cast<Stream>(stream),
                         &cluster,
                         k.cluster > 1};
  void* arguments[] = {params};
  Result status;
  {
    py::gil_scoped_release release;  // the call waits when the queue of launches is full
    status = k.driver->LaunchKernelEx(&config, k.function, arguments, nullptr);
  }
  if (status != 0)
    fail(k, "launching " + py::repr(grid).cast<std::string>() + " blocks of " + std::to_string(k.threads) + " threads with " +
                std::to_string(k.shared) + " bytes of shared memory failed with " + words(*k.driver, status));
}

py::object driver_error() {
  try {
    driver();
    return py::none();
  } catch (const std::runtime_error& failure) {
    return py::str(failure.what());
  }
}

}  // namespace

void bind_launch(py::module_& m) {
  py::class_<Loaded>(m, "LoadedKernel");
  m.def("driver_error", &driver_error);
  m.def("use_driver", &use_driver);
  m.def("load_kernel", &load_kernel, py::kw_only(), py::arg("image"), py::arg("name"), py::arg("label"), py::arg("device"),
        py::arg("threads"), py::arg("shared"), py::arg("cluster"), py::arg("bytes"), py::arg("fields"));
  m.def("launch_kernel", &launch_kernel);
}

}  // namespace fastattn
