// The doors of layer_norm and rms_norm. norm_fwd and norm_bwd take tensors that the specification has checked; norm_eager
// and norm_bwd_eager are the short road: they check everything themselves, allocate the results and return None when the
// ordinary road should serve.
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

// An uninitialised result and its view; false when only the ordinary road can allocate.
bool new_tensor(int ndim, const int64_t* shape, Dtype dtype, py::object* out, View* view) {
  *out = py::reinterpret_steal<py::object>(empty_tensor(ndim, shape, dtype));
  return *out && try_view(out->ptr(), view);
}

// Is v one float32 per row of x, without gaps?
bool dense_floats(const View& v, const View& x) {
  if (v.dtype != Dtype::f32 || v.ndim != x.ndim - 1) return false;
  int64_t next = 1;
  for (int i = v.ndim - 1; i >= 0; next *= v.shape[i--])
    if (v.shape[i] != x.shape[i] || (v.shape[i] != 1 && v.stride[i] != next)) return false;
  return true;
}

// Are these, each or None, a weight and a bias for rows like those of x?
bool affine_of(const View& x, const View& weight, const py::handle& weight_object, const View& bias,
               const py::handle& bias_object) {
  for (const View* v : {&weight, &bias})
    if (v->ndim > 0 && (!vector_of(*v, x.shape[x.ndim - 1]) || (v->dtype != x.dtype && v->dtype != Dtype::f32))) return false;
  if (weight.ndim > 0 && bias.ndim > 0 && weight.dtype != bias.dtype) return false;
  return (weight.ndim > 0 || weight_object.is_none()) && (bias.ndim > 0 || bias_object.is_none());
}

py::object norm_eager(const py::handle& x_object, const py::handle& weight_object, const py::handle& bias_object,
                      const py::handle& residual_object, bool centred, const py::handle& eps_object,
                      const py::handle& weight_offset_object, const py::handle& rounding, int nthreads, bool saves) {
  View x, weight, bias, residual;
  if (!PyFloat_CheckExact(eps_object.ptr()) || !PyFloat_CheckExact(weight_offset_object.ptr()) ||
      !PyUnicode_CheckExact(rounding.ptr()))
    return py::none();
  double eps = PyFloat_AS_DOUBLE(eps_object.ptr()), weight_offset = PyFloat_AS_DOUBLE(weight_offset_object.ptr());
  bool round_first = PyUnicode_CompareWithASCIIString(rounding.ptr(), "llama") == 0;
  bool known = round_first || PyUnicode_CompareWithASCIIString(rounding.ptr(), "last") == 0;
  if (!known || !(eps >= 0) || std::isinf(eps) || !std::isfinite(static_cast<float>(weight_offset))) return py::none();
  if (!try_view(x_object.ptr(), &x) || !optional_view(weight_object, &weight) || !optional_view(bias_object, &bias) ||
      !optional_view(residual_object, &residual))
    return py::none();
  if (!floating(x.dtype) || !unit_rows(x)) return py::none();
  if (!affine_of(x, weight, weight_object, bias, bias_object) || (weight.ndim == 0 && weight_offset != 0)) return py::none();
  bool added = !residual_object.is_none();
  if (added && (!same_shape(x, residual) || residual.dtype != x.dtype || !unit_rows(residual))) return py::none();
  py::object y, sum, mean = py::none(), rstd;
  View y_view, sum_view, mean_view, rstd_view;
  bool made = new_tensor(x.ndim, x.shape, x.dtype, &y, &y_view) &&
              (!added || new_tensor(x.ndim, x.shape, x.dtype, &sum, &sum_view)) &&
              (!saves || new_tensor(x.ndim - 1, x.shape, Dtype::f32, &rstd, &rstd_view)) &&
              (!saves || !centred || new_tensor(x.ndim - 1, x.shape, Dtype::f32, &mean, &mean_view));
  if (!made) return py::none();
  norm_fwd(x, weight, bias, residual, y_view, sum_view, mean_view, rstd_view, centred, eps, weight_offset, round_first, nthreads);
  if (saves) return py::make_tuple(std::move(y), added ? std::move(sum) : py::none(), std::move(mean), std::move(rstd));
  if (added) return py::make_tuple(std::move(y), std::move(sum));
  return y;
}

// dx, dweight, dbias, None where a gradient is not wanted. The statistics are those that the forward saved.
py::object norm_bwd_eager(const py::handle& dy_object, const py::handle& dsum_object, const py::handle& x_object,
                          const py::handle& weight_object, const py::handle& bias_object, const py::handle& mean_object,
                          const py::handle& rstd_object, bool centred, double weight_offset, bool wants_dweight, bool wants_dbias,
                          int nthreads) {
  View x, dy, dsum, weight, bias, mean, rstd;
  if (!try_view(x_object.ptr(), &x) || !try_view(dy_object.ptr(), &dy) || !optional_view(dsum_object, &dsum) ||
      !optional_view(weight_object, &weight) || !optional_view(bias_object, &bias) || !optional_view(mean_object, &mean) ||
      !try_view(rstd_object.ptr(), &rstd))
    return py::none();
  if (!floating(x.dtype) || !unit_rows(x) || !std::isfinite(weight_offset) || wants_dweight > (weight.ndim > 0) ||
      wants_dbias > (bias.ndim > 0) || centred == mean_object.is_none())
    return py::none();
  if (!affine_of(x, weight, weight_object, bias, bias_object)) return py::none();
  auto like_x = [&](const View& v) { return same_shape(x, v) && v.dtype == x.dtype && unit_rows(v); };
  if (!like_x(dy) || (!dsum_object.is_none() && !like_x(dsum))) return py::none();
  if (!dense_floats(rstd, x) || (centred && !dense_floats(mean, x))) return py::none();
  py::object dx, dweight, dbias;
  View dx_view, dweight_view, dbias_view;
  bool made = new_tensor(x.ndim, x.shape, x.dtype, &dx, &dx_view) &&
              (!wants_dweight || new_tensor(1, weight.shape, weight.dtype, &dweight, &dweight_view)) &&
              (!wants_dbias || new_tensor(1, bias.shape, bias.dtype, &dbias, &dbias_view));
  if (!made) return py::none();
  norm_bwd(dy, dsum, x, weight, mean, rstd, dx_view, dweight_view, dbias_view, centred, weight_offset, nthreads);
  return py::make_tuple(std::move(dx), wants_dweight ? std::move(dweight) : py::none(),
                        wants_dbias ? std::move(dbias) : py::none());
}

}  // namespace

void bind_norms(py::module_& m) {
  m.def("norm_fwd", &norm_fwd);
  m.def("norm_bwd", &norm_bwd);
  m.def("norm_eager", &norm_eager, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg("saves") = false);
  m.def("norm_bwd_eager", &norm_bwd_eager);
}

}  // namespace fastattn
