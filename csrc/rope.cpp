// The doors of rope and rope_qk. `rope` writes into outputs that exist; `rope_eager` is the short road of small calls: it
// checks everything itself and returns None when the ordinary road should serve. Both check every position id, because a
// wrong one would read past the table.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// The sizes that x is indexed by; a packed x [total, nheads, headdim] is one batch entry.
struct Shape {
  int64_t batch, seqlen, nheads, headdim;
};

Shape shape_of(const View& x) {
  if (x.ndim == 3) return {1, x.shape[0], x.shape[1], x.shape[2]};
  return {x.shape[0], x.shape[1], x.shape[2], x.shape[3]};
}

void set_stride(const View& x, int64_t* stride) {
  stride[0] = x.ndim == 4 ? x.stride[0] : 0;
  for (int i = 0; i < 2; ++i) stride[1 + i] = x.stride[x.ndim - 3 + i];
}

bool unit_last(const View& v) { return v.stride[v.ndim - 1] == 1 || v.shape[v.ndim - 1] <= 1 || v.numel() == 0; }

bool is_rotatable(const View& x) {
  return (x.ndim == 3 || x.ndim == 4) && unit_last(x) && (x.dtype == Dtype::f32 || x.dtype == Dtype::bf16 || x.dtype == Dtype::f16);
}

// A table [rows, half] or [batch or 1, rows, half].
bool set_table(const View& v, const Shape& shape, int64_t half, int64_t rows, int64_t* stride) {
  if ((v.ndim != 2 && v.ndim != 3) || v.shape[v.ndim - 1] != half || v.shape[v.ndim - 2] != rows || !unit_last(v)) return false;
  if (v.ndim == 3 && v.shape[0] != shape.batch && v.shape[0] != 1) return false;
  stride[0] = v.ndim == 3 && v.shape[0] > 1 ? v.stride[0] : 0;
  stride[1] = v.stride[v.ndim - 2];
  return true;
}

template <class T>
void check_positions(const char* op, const View& v, int64_t rows) {
  int64_t outer = v.ndim == 2 ? v.shape[0] : 1, inner = v.shape[v.ndim - 1];
  int64_t outer_stride = v.ndim == 2 ? v.stride[0] : 0, inner_stride = v.stride[v.ndim - 1];
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      int64_t id = v.as<T>()[i * outer_stride + j * inner_stride];
      if (id < 0 || id >= rows)
        throw py::value_error(std::string(op) + ": position_ids must be between 0 and " + std::to_string(rows - 1) + " (cos has " +
                              std::to_string(rows) + " rows), got " + std::to_string(id));
    }
}

bool set_positions(const char* op, const View& v, const Shape& shape, int64_t rows, RopeParams* p) {
  if (v.ndim == 0) return rows >= shape.seqlen;
  if (v.ndim > 2 || v.shape[v.ndim - 1] != shape.seqlen) return false;
  if (v.ndim == 2 && v.shape[0] != shape.batch && v.shape[0] != 1) return false;
  if (v.dtype == Dtype::i64)
    check_positions<int64_t>(op, v, rows);
  else if (v.dtype == Dtype::i32)
    check_positions<int32_t>(op, v, rows);
  else
    return false;
  p->positions = v.data;
  p->positions_int64 = v.dtype == Dtype::i64;
  p->position_stride[0] = v.ndim == 2 && v.shape[0] > 1 ? v.stride[0] : 0;
  p->position_stride[1] = v.stride[v.ndim - 1];
  return true;
}

// Fills everything but the outputs; false when a tensor is not as the contract says. k.ndim == 0: absent.
bool set_inputs(const char* op, const View& q, const View& k, const View& cos, const View& sin, const View& positions,
                RopeParams* p) {
  if (!is_rotatable(q)) return false;
  Shape shape = shape_of(q);
  const View* views[2] = {&q, &k};
  for (int i = 0; i < 2; ++i) {
    const View& v = *views[i];
    if (i == 1 && v.ndim == 0) continue;
    Shape s = shape_of(v);
    if (!is_rotatable(v) || v.ndim != q.ndim || v.dtype != q.dtype || s.batch != shape.batch || s.seqlen != shape.seqlen)
      return false;
    p->tensor[i].x = v.data;
    p->tensor[i].nheads = s.nheads;
    p->tensor[i].headdim = s.headdim;
    set_stride(v, p->tensor[i].x_stride);
  }
  if (cos.ndim < 2 || cos.dtype != sin.dtype || (cos.dtype != q.dtype && cos.dtype != Dtype::f32)) return false;
  p->dtype = static_cast<int>(q.dtype);
  p->table_dtype = static_cast<int>(cos.dtype);
  p->batch = shape.batch;
  p->seqlen = shape.seqlen;
  p->half = cos.shape[cos.ndim - 1];
  int64_t rows = cos.shape[cos.ndim - 2];
  for (const RopeTensor& t : p->tensor)
    if (t.x != nullptr && t.headdim < 2 * p->half) return false;
  p->cos = cos.data;
  p->sin = sin.data;
  return set_table(cos, shape, p->half, rows, p->cos_stride) && set_table(sin, shape, p->half, rows, p->sin_stride) &&
         set_positions(op, positions, shape, rows, p);
}

void run(const RopeParams& p) {
  int64_t elements = p.batch * p.seqlen * (p.tensor[0].nheads * p.tensor[0].headdim + p.tensor[1].nheads * p.tensor[1].headdim);
  if (elements == 0) return;
  if (elements < (64 << 10)) return kernels().rope(p);
  py::gil_scoped_release release;
  kernels().rope(p);
}

void rope(const char* op, const View& q, const View& q_out, const View& k, const View& k_out, const View& cos, const View& sin,
          const View& positions, bool interleaved, bool inverse, int nthreads) {
  RopeParams p;
  if (!set_inputs(op, q, k, cos, sin, positions, &p))
    throw std::runtime_error(std::string(op) + ": the kernel got tensors against its contract");
  p.tensor[0].y = q_out.data;
  set_stride(q_out, p.tensor[0].y_stride);
  if (k.ndim > 0) {
    p.tensor[1].y = k_out.data;
    set_stride(k_out, p.tensor[1].y_stride);
  }
  if (!unit_last(q_out) || (k.ndim > 0 && !unit_last(k_out)))
    throw std::runtime_error(std::string(op) + ": an output must have unit last stride");
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.nthreads = nthreads;
  run(p);
}

// A new tensor of x's shape and order of strides, as torch.empty_like gives; null when x is expanded.
py::object empty_like(const View& x, RopeTensor* t) {
  int order[View::kMaxDims];
  int64_t stride[View::kMaxDims];
  for (int i = 0; i < x.ndim; ++i) {
    if (x.stride[i] == 0 && x.shape[i] > 1) return {};
    int at = i;
    for (; at > 0 && x.shape[i] > 1 && x.stride[order[at - 1]] < x.stride[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  int64_t next = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    stride[order[i]] = next;
    next *= x.shape[order[i]];
  }
  View y;
  auto object = py::reinterpret_steal<py::object>(empty_tensor(x.ndim, x.shape, x.dtype, stride));
  if (!object || !try_view(object.ptr(), &y) || !unit_last(y)) return {};
  t->y = y.data;
  set_stride(y, t->y_stride);
  return object;
}

py::object rope_eager(const py::handle& q_object, const py::handle& k_object, const py::handle& cos_object,
                      const py::handle& sin_object, const py::handle& positions_object, const py::handle& interleaved,
                      int nthreads) {
  View q, k, cos, sin, positions;
  RopeParams p;
  if (!PyBool_Check(interleaved.ptr())) return py::none();
  bool two = !k_object.is_none(), placed = !positions_object.is_none();
  if (!try_view(q_object.ptr(), &q) || !try_view(cos_object.ptr(), &cos) || !try_view(sin_object.ptr(), &sin)) return py::none();
  if (two && (!try_view(k_object.ptr(), &k) || k.ndim == 0)) return py::none();
  if (placed && (!try_view(positions_object.ptr(), &positions) || positions.ndim == 0)) return py::none();
  if (!set_inputs(two ? "rope_qk" : "rope", q, k, cos, sin, positions, &p)) return py::none();
  p.interleaved = interleaved.ptr() == Py_True;
  p.nthreads = nthreads;
  py::object q_out = empty_like(q, &p.tensor[0]), k_out;
  if (!q_out) return py::none();
  if (two) {
    k_out = empty_like(k, &p.tensor[1]);
    if (!k_out) return py::none();
  }
  run(p);
  if (two) return py::make_tuple(std::move(q_out), std::move(k_out));
  return q_out;
}

}  // namespace

void bind_rope(py::module_& m) {
  m.def("rope", &rope);
  m.def("rope_eager", &rope_eager);
}

}  // namespace fastattn
