// The doors of layer_norm and rms_norm. norm_fwd and norm_bwd take tensors that the specification has checked; norm_eager
// is the short road of small calls: it checks everything itself and returns None when the ordinary road should serve.
#include <pybind11/pybind11.h>

#include <cmath>

#include "cpu/kernels.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {
namespace {

bool floating(Dtype t) { return t == Dtype::f32 || t == Dtype::bf16 || t == Dtype::f16; }

// The leading axes of v, merged where one runs on from the next. An absent tensor gives absent rows.
Rows rows_of(const View& v) {
  Rows rows;
  rows.data = v.data;
  for (int i = 0; i < v.ndim - 1; ++i) {
    if (v.shape[i] == 1) continue;
    if (rows.ndim > 0 && rows.stride[rows.ndim - 1] == v.shape[i] * v.stride[i]) {
      rows.shape[rows.ndim - 1] *= v.shape[i];
      rows.stride[rows.ndim - 1] = v.stride[i];
      continue;
    }
    rows.shape[rows.ndim] = v.shape[i];
    rows.stride[rows.ndim++] = v.stride[i];
  }
  return rows;
}

bool unit_rows(const View& v) { return v.ndim > 0 && (v.stride[v.ndim - 1] == 1 || v.shape[v.ndim - 1] <= 1 || v.numel() == 0); }

bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

bool vector_of(const View& v, int64_t cols) { return v.ndim == 1 && v.shape[0] == cols && (v.stride[0] == 1 || cols <= 1); }

template <class Params>
void set_rows(Params* p, const View& x) {
  p->dtype = static_cast<int>(x.dtype);
  p->cols = x.shape[x.ndim - 1];
  p->rows = 1;
  for (int i = 0; i < x.ndim - 1; ++i) p->rows *= x.shape[i];
  p->x = rows_of(x);
}

// Other Python threads may run during a call that is long enough for them to notice.
template <class Run>
void without_gil(int64_t elements, Run run) {
  if (elements < (64 << 10)) return run();
  py::gil_scoped_release release;
  run();
}

void norm_fwd(const View& x, const View& weight, const View& bias, const View& residual, const View& y, const View& sum,
              const View& mean, const View& rstd, bool centred, double eps, double weight_offset, bool round_first, int nthreads) {
  NormParams p;
  set_rows(&p, x);
  p.centred = centred;
  p.weight_dtype = static_cast<int>(weight ? weight.dtype : bias ? bias.dtype : x.dtype);
  p.residual = rows_of(residual);
  p.weight = weight.data;
  p.bias = bias.data;
  p.y = y.data;
  p.sum = sum.data;
  p.mean = mean.as<float>();
  p.rstd = rstd.as<float>();
  p.eps = eps;
  p.weight_offset = static_cast<float>(weight_offset);
  p.round_first = round_first;
  p.nthreads = nthreads;
  without_gil(p.rows * p.cols, [&] { kernels().norm_fwd(p); });
}

void norm_bwd(const View& dy, const View& dsum, const View& x, const View& weight, const View& mean, const View& rstd,
              const View& dx, const View& dweight, const View& dbias, bool centred, double weight_offset, int nthreads) {
  NormBwdParams p;
  set_rows(&p, x);
  p.centred = centred;
  const View& weightlike = weight ? weight : dbias ? dbias : x;
  p.weight_dtype = static_cast<int>(weightlike.dtype);
  p.dy = rows_of(dy);
  p.dsum = rows_of(dsum);
  p.weight = weight.data;
  p.mean = mean.as<float>();
  p.rstd = rstd.as<float>();
  p.dx = dx.data;
  p.dweight = dweight.data;
  p.dbias = dbias.data;
  p.weight_offset = static_cast<float>(weight_offset);
  p.nthreads = nthreads;
  without_gil(p.rows * p.cols, [&] { kernels().norm_bwd(p); });
}

bool optional_view(const py::handle& object, View* out) { return object.is_none() || try_view(object.ptr(), out); }

py::object norm_eager(const py::handle& x_object, const py::handle& weight_object, const py::handle& bias_object,
                      const py::handle& residual_object, bool centred, const py::handle& eps, const py::handle& weight_offset,
                      const py::handle& rounding, int nthreads) {
  View x, weight, bias, residual;
  if (!PyFloat_CheckExact(eps.ptr()) || !PyFloat_CheckExact(weight_offset.ptr()) || !PyUnicode_CheckExact(rounding.ptr()))
    return py::none();
  NormParams p;
  p.eps = PyFloat_AS_DOUBLE(eps.ptr());
  p.weight_offset = static_cast<float>(PyFloat_AS_DOUBLE(weight_offset.ptr()));
  p.round_first = PyUnicode_CompareWithASCIIString(rounding.ptr(), "llama") == 0;
  bool known = p.round_first || PyUnicode_CompareWithASCIIString(rounding.ptr(), "last") == 0;
  if (!known || !(p.eps >= 0) || std::isinf(p.eps) || !std::isfinite(p.weight_offset)) return py::none();
  if (!try_view(x_object.ptr(), &x) || !optional_view(weight_object, &weight) || !optional_view(bias_object, &bias) ||
      !optional_view(residual_object, &residual))
    return py::none();
  if (!floating(x.dtype) || !unit_rows(x)) return py::none();
  set_rows(&p, x);
  p.weight_dtype = p.dtype;
  for (const View* v : {&weight, &bias}) {
    if (v->ndim == 0) continue;
    if (!vector_of(*v, p.cols) || (v->dtype != x.dtype && v->dtype != Dtype::f32)) return py::none();
    p.weight_dtype = static_cast<int>(v->dtype);
  }
  if (weight.ndim > 0 && bias.ndim > 0 && weight.dtype != bias.dtype) return py::none();
  if (weight.ndim == 0 && (p.weight_offset != 0 || !weight_object.is_none())) return py::none();
  if (!bias_object.is_none() && bias.ndim == 0) return py::none();
  bool added = !residual_object.is_none();
  if (added && (!same_shape(x, residual) || residual.dtype != x.dtype || !unit_rows(residual))) return py::none();
  auto y = py::reinterpret_steal<py::object>(empty_tensor(x.ndim, x.shape, x.dtype));
  View y_view, sum_view;
  if (!y || !try_view(y.ptr(), &y_view)) return py::none();
  py::object sum;
  if (added) {
    sum = py::reinterpret_steal<py::object>(empty_tensor(x.ndim, x.shape, x.dtype));
    if (!sum || !try_view(sum.ptr(), &sum_view)) return py::none();
  }
  p.centred = centred;
  p.residual = rows_of(residual);
  p.weight = weight.data;
  p.bias = bias.data;
  p.y = y_view.data;
  p.sum = sum_view.data;
  p.nthreads = nthreads;
  without_gil(p.rows * p.cols, [&] { kernels().norm_fwd(p); });
  if (added) return py::make_tuple(std::move(y), std::move(sum));
  return y;
}

}  // namespace

void bind_norms(py::module_& m) {
  m.def("norm_fwd", &norm_fwd);
  m.def("norm_bwd", &norm_bwd);
  m.def("norm_eager", &norm_eager);
}

}  // namespace fastattn
