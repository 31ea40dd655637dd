#include "tensor_map.h"

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace py = pybind11;

namespace fastattn::cuda {
namespace {

constexpr int kMaxRank = 5;
constexpr size_t kMostKept = 4096;

struct Shape {
  const void* driver;
  const void* dtype;  // torch's object for it, of which there is one
  int64_t rank, swizzle;
  int64_t sizes[kMaxRank], strides[kMaxRank], box[kMaxRank];

  bool operator==(const Shape& other) const { return std::memcmp(this, &other, sizeof(Shape)) == 0; }
};
static_assert(sizeof(Shape) == (4 + 3 * kMaxRank) * 8, "compared byte by byte: no padding");

struct HashOfShape {
  size_t operator()(const Shape& shape) const {
    uint64_t words[sizeof(Shape) / 8], hash = 0x9e3779b97f4a7c15;
    std::memcpy(words, &shape, sizeof(Shape));
    for (uint64_t word : words) hash = (hash ^ word) * 0xff51afd7ed558ccd, hash ^= hash >> 32;
    return hash;
  }
};

std::mutex guard;
std::unordered_map<Shape, TensorMap, HashOfShape> kept;

int64_t integer(PyObject* object) {
  int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

int64_t read(py::handle map, int item, int64_t* out) {
  PyObject* tuple = PyTuple_GET_ITEM(map.ptr(), item);
  if (!PyTuple_Check(tuple)) throw py::type_error("TensorMap: sizes, strides and box must be tuples of integers");
  if (PyTuple_GET_SIZE(tuple) > kMaxRank) {
    map.attr("check")();
    throw py::value_error("TensorMap: strides and box must be as long as sizes");
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) out[i] = integer(PyTuple_GET_ITEM(tuple, i));
  return PyTuple_GET_SIZE(tuple);
}

void encode_anew(const Driver& d, py::handle map, const Shape& shape, void* address, TensorMap* out) {
  map.attr("check")();
  int type = map.attr("type_code").cast<int>();
  int64_t bytes_each = map.attr("tensor").attr("element_size")().cast<int64_t>();
  uint64_t sizes[kMaxRank], strides[kMaxRank] = {};
  uint32_t box[kMaxRank], ones[kMaxRank] = {1, 1, 1, 1, 1};
  for (int i = 0; i < shape.rank; ++i) {
    sizes[i] = static_cast<uint64_t>(shape.sizes[i]);
    box[i] = static_cast<uint32_t>(shape.box[i]);
    strides[i] = static_cast<uint64_t>(shape.strides[i] * bytes_each);
  }
  int swizzle = shape.swizzle == 128 ? 3 : static_cast<int>(shape.swizzle) / 32;  // CU_TENSOR_MAP_SWIZZLE_NONE, 32B, 64B, 128B
  Result status = d.TensorMapEncodeTiled(out, type, static_cast<uint32_t>(shape.rank), address, sizes, strides, box, ones,
                                         kInterleaveNone, swizzle, kPromote128, kFillZeros);
  if (status != 0)
    throw std::runtime_error("cuTensorMapEncodeTiled failed with " + words(d, status) + " for " +
                             py::repr(map).cast<std::string>());
}

}  // namespace

void encode(const Driver& d, py::handle map, void* address, TensorMap* out) {
  Shape shape = {};
  shape.driver = &d;
  auto dtype = py::object(map.attr("tensor").attr("dtype"));
  shape.dtype = dtype.ptr();
  shape.rank = read(map, 1, shape.sizes);
  read(map, 2, shape.strides);
  read(map, 3, shape.box);
  shape.swizzle = integer(PyTuple_GET_ITEM(map.ptr(), 4));
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) {  // else `check` below says so
    std::lock_guard<std::mutex> lock(guard);
    auto found = kept.find(shape);
    if (found != kept.end()) {
      *out = found->second;
      if (Result status = d.TensorMapReplaceAddress(out, address))
        throw std::runtime_error("cuTensorMapReplaceAddress failed with " + words(d, status));
      return;
    }
  }
  encode_anew(d, map, shape, address, out);
  std::lock_guard<std::mutex> lock(guard);
  if (kept.size() >= kMostKept) kept.clear();
  kept.emplace(shape, *out);
}

}  // namespace fastattn::cuda
