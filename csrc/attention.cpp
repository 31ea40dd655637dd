// The doors of attention: fill the params struct from tensor views and release the GIL. All checks of meaning are in
// fastattn/ops/attention/spec.py; here only what would let a kernel read outside its tensors.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// [batch, seqlen, head] strides of a 4-D tensor, or of a packed 3-D one (batch stride 0).
void strides(const View& t, int64_t (&to)[3]) {
  bool packed = t.ndim == 3;
  to[0] = packed ? 0 : t.stride[0];
  to[1] = t.stride[packed ? 0 : 1];
  to[2] = t.stride[packed ? 1 : 2];
}

void lse_strides(const View& t, int64_t (&to)[2]) {
  to[0] = t.ndim == 3 ? t.stride[0] : 0;
  to[1] = t.stride[t.ndim == 3 ? 1 : 0];
}

// Broadcast dimensions (size 1, or missing in front) get stride 0.
void pair_strides(const View& t, int64_t (&to)[4]) {
  for (int i = 0; i < 4; ++i) {
    int j = t.ndim - 4 + i;
    to[i] = j < 0 || t.shape[j] == 1 ? 0 : t.stride[j];
  }
}

// The options that forward and backward share, in one Python tuple so that a call converts few arguments:
// (left, right, upper_left, scale, softcap, dropout_p, max_seqlen_q, max_seqlen_k, num_threads)
void fill(AttentionParams& p, const View& q, const View& k, const View& v, const View& o, const View& lse, const View& mask,
          const View& bias, const View& alibi_slopes, const View& sinks, const View& cu_seqlens_q, const View& cu_seqlens_k,
          const View& philox, const py::tuple& options) {
  bool packed = q.ndim == 3;
  if (q.dtype > Dtype::f16) throw py::value_error("attention: q must be float32, bfloat16 or float16");
  p.dtype = static_cast<int>(q.dtype);
  p.batch = packed ? cu_seqlens_q.shape[0] - 1 : q.shape[0];
  p.nheads = q.shape[q.ndim - 2];
  p.headdim = q.shape[q.ndim - 1];
  p.nheads_k = k.shape[k.ndim - 2];
  p.headdim_v = v.shape[v.ndim - 1];
  p.q = q.data;
  p.k = k.data;
  p.v = v.data;
  p.o = o.data;
  p.lse = lse.as<float>();
  strides(q, p.q_stride);
  strides(k, p.k_stride);
  strides(v, p.v_stride);
  strides(o, p.o_stride);
  if (lse) lse_strides(lse, p.lse_stride);
  if (packed) {
    p.cu_seqlens_q = cu_seqlens_q.as<int32_t>();
    p.cu_seqlens_k = cu_seqlens_k.as<int32_t>();
  }
  py::handle left = options[0], right = options[1];
  p.left = left.is_none() ? kUnbounded : left.cast<int64_t>();
  p.right = right.is_none() ? kUnbounded : right.cast<int64_t>();
  p.upper_left = options[2].cast<bool>();
  p.scale = options[3].cast<float>();
  py::handle softcap = options[4];
  p.softcap = softcap.is_none() ? 0.0f : softcap.cast<float>();
  p.seqlen_q = packed ? options[6].cast<int64_t>() : q.shape[1];
  p.seqlen_k = packed ? options[7].cast<int64_t>() : k.shape[1];
  // Waking a thread costs about a microsecond; below this many FLOPs it is not earned back.
  double flops = 2.0 * static_cast<double>(p.batch * p.nheads) * p.seqlen_q * p.seqlen_k * (p.headdim + p.headdim_v);
  p.nthreads = flops < 5e5 ? 1 : options[8].cast<int>();
  if (mask) {
    p.mask = mask.as<bool>();
    pair_strides(mask, p.mask_stride);
  }
  if (bias) {
    p.bias = bias.data;
    p.bias_dtype = static_cast<int>(bias.dtype);
    pair_strides(bias, p.bias_stride);
  }
  if (alibi_slopes) {
    p.alibi_slopes = alibi_slopes.as<float>();
    p.alibi_stride[0] = alibi_slopes.ndim == 2 ? alibi_slopes.stride[0] : 0;
    p.alibi_stride[1] = alibi_slopes.stride[alibi_slopes.ndim - 1];
  }
  if (sinks) p.sinks = sinks.as<float>();
  double dropout_p = options[5].cast<double>();
  if (dropout_p > 0.0) {
    auto seed = static_cast<uint64_t>(philox.as<int64_t>()[0]), offset = static_cast<uint64_t>(philox.as<int64_t>()[1]);
    p.dropout = true;
    p.dropout_threshold = static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
    p.dropout_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    p.philox_key[0] = static_cast<uint32_t>(seed);
    p.philox_key[1] = static_cast<uint32_t>(seed >> 32);
    p.philox_offset = static_cast<uint32_t>(offset);
  }
}

void run_forward(const AttentionParams& p) {
  if (kernels().attention_is_decode(p))
    kernels().attention_decode(p);
  else
    kernels().attention_fwd(p);
}

void attention_fwd(View q, View k, View v, View o, View lse, View mask, View bias, View alibi_slopes, View sinks, View cu_seqlens_q,
                   View cu_seqlens_k, View philox, const py::tuple& options) {
  AttentionParams p;
  fill(p, q, k, v, o, lse, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox, options);
  py::gil_scoped_release release;
  run_forward(p);
}

bool is_bshd(const View& t) { return t.ndim == 4 && t.dtype <= Dtype::f16 && (t.stride[3] == 1 || t.shape[3] == 1); }

// The short road of small calls without options: checks, allocates and computes in one call. (o, lse), or None when the
// ordinary road should serve or raise. A decoding step costs less than the Python of the ordinary road.
py::object attention_eager(const py::handle& q_object, const py::handle& k_object, const py::handle& v_object,
                           const py::handle& left, const py::handle& right, bool upper_left, const py::handle& scale,
                           int nthreads) {
  View q, k, v;
  if (!try_view(q_object.ptr(), &q) || !try_view(k_object.ptr(), &k) || !try_view(v_object.ptr(), &v)) return py::none();
  if (!is_bshd(q) || !is_bshd(k) || !is_bshd(v) || k.dtype != q.dtype || v.dtype != q.dtype) return py::none();
  bool fits = k.shape[0] == q.shape[0] && k.shape[3] == q.shape[3] && k.shape[2] > 0 && q.shape[2] % k.shape[2] == 0 &&
              q.shape[2] > 0 && q.shape[3] > 0 && v.shape[3] > 0;
  for (int i = 0; i < 3; ++i) fits = fits && v.shape[i] == k.shape[i];
  double factor = 1.0 / std::sqrt(static_cast<double>(q.shape[3]));
  if (!scale.is_none()) {
    if (!PyFloat_CheckExact(scale.ptr())) return py::none();
    factor = PyFloat_AS_DOUBLE(scale.ptr());
  }
  if (!fits || !std::isfinite(factor)) return py::none();
  int64_t o_shape[4] = {q.shape[0], q.shape[1], q.shape[2], v.shape[3]}, lse_shape[3] = {q.shape[0], q.shape[2], q.shape[1]};
  auto o = py::reinterpret_steal<py::object>(empty_tensor(4, o_shape, q.dtype));
  if (!o) return py::none();
  auto lse = py::reinterpret_steal<py::object>(empty_tensor(3, lse_shape, Dtype::f32));
  AttentionParams p;
  fill(p, q, k, v, view_of(o.ptr()), view_of(lse.ptr()), View(), View(), View(), View(), View(), View(), View(),
       py::make_tuple(left, right, upper_left, factor, py::none(), 0.0, 0, 0, nthreads));
  {
    py::gil_scoped_release release;
    run_forward(p);
  }
  return py::make_tuple(std::move(o), std::move(lse));
}

// The weights [batch, nheads, seqlen_q, seqlen_k] from lse.
void attention_weights(View q, View k, View lse, View mask, View bias, View alibi_slopes, View cu_seqlens_q, View cu_seqlens_k,
                       const py::tuple& options, View weights) {
  AttentionParams p;
  fill(p, q, k, k, weights, lse, mask, bias, alibi_slopes, View(), cu_seqlens_q, cu_seqlens_k, View(), options);
  p.o_stride[0] = weights.stride[0];
  p.o_stride[1] = weights.stride[2];
  p.o_stride[2] = weights.stride[1];
  py::gil_scoped_release release;
  kernels().attention_weights(p);
}

// The caches as they are, paged or not; cache_seqlens counts the keys to attend to, new ones included.
void attention_kvcache(View q, View k_cache, View v_cache, View seqlens, View block_table, View alibi_slopes, View sinks, View o,
                       View lse, const py::tuple& options, int64_t num_splits) {
  AttentionParams p;
  fill(p, q, k_cache, v_cache, o, lse, View(), View(), alibi_slopes, sinks, View(), View(), View(), options);
  p.seqlens_k = seqlens.as<int32_t>();
  if (block_table) {
    p.block_table = block_table.as<int32_t>();
    p.block_table_stride = block_table.stride[0];
    p.block_size = k_cache.shape[1];
  }
  p.num_splits = num_splits;
  // The longest sequence bounds the grid; the caches are usually larger.
  p.seqlen_k = 0;
  for (int64_t b = 0; b < p.batch; ++b) p.seqlen_k = p.seqlens_k[b] > p.seqlen_k ? p.seqlens_k[b] : p.seqlen_k;
  py::gil_scoped_release release;
  run_forward(p);
}

// Copies k, v [batch, seqlen, nheads_k, headdim] into the slots from seqlens[b] on. Rows are copied by bytes.
void kvcache_append(View k, View v, View k_cache, View v_cache, View seqlens, View block_table) {
  auto copy = [&](const View& from, const View& to) {
    int64_t size = size_of(from.dtype), row = from.shape[3] * size;
    for (int64_t b = 0; b < from.shape[0]; ++b)
      for (int64_t i = 0; i < from.shape[1]; ++i) {
        int64_t slot = seqlens.as<int32_t>()[b] + i, block = b;
        if (block_table) {
          block = block_table.as<int32_t>()[b * block_table.stride[0] + slot / to.shape[1]];
          slot %= to.shape[1];
        }
        for (int64_t h = 0; h < from.shape[2]; ++h)
          std::memcpy(to.as<char>() + (block * to.stride[0] + slot * to.stride[1] + h * to.stride[2]) * size,
                      from.as<char>() + (b * from.stride[0] + i * from.stride[1] + h * from.stride[2]) * size, row);
      }
  };
  py::gil_scoped_release release;
  copy(k, k_cache);
  copy(v, v_cache);
}

void attention_bwd(View q, View k, View v, View o, View lse, View mask, View bias, View alibi_slopes, View sinks, View cu_seqlens_q,
                   View cu_seqlens_k, View philox, const py::tuple& options, View dout, View dlse, View dq, View dk, View dv,
                   View dbias, View dsinks) {
  AttentionBwdParams p;
  fill(p, q, k, v, o, lse, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox, options);
  p.dout = dout.data;
  p.dq = dq.data;
  p.dk = dk.data;
  p.dv = dv.data;
  strides(dout, p.do_stride);
  strides(dq, p.dq_stride);
  strides(dk, p.dk_stride);
  strides(dv, p.dv_stride);
  if (dlse) {
    p.dlse = dlse.as<float>();
    lse_strides(dlse, p.dlse_stride);
  }
  if (dbias) {
    p.dbias = dbias.as<float>();
    pair_strides(dbias, p.dbias_stride);
  }
  if (dsinks) p.dsinks = dsinks.as<float>();
  py::gil_scoped_release release;
  kernels().attention_bwd(p);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd", &attention_fwd);
  m.def("attention_eager", &attention_eager);
  m.def("attention_bwd", &attention_bwd);
  m.def("attention_weights", &attention_weights);
  m.def("attention_kvcache", &attention_kvcache);
  m.def("kvcache_append", &kvcache_append);
}

}  // namespace fastattn
