// What happens to a tile of scores between the two products, shared by forward and backward: where the band, the mask
// and the lengths let a query see a key, and scale, softcap, ALiBi and bias in the order of the contract.
// A tile is S^T: [keys][kM], lanes are queries.
#pragma once
#include "attention_params.h"
#include "philox.h"
#include "tile.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

// One (batch, head) with its lengths resolved.
struct Head {
  int64_t b, h, hk;          // batch, query head, key head
  int64_t sq, sk;            // lengths of this sequence
  int64_t q_start, k_start;  // first row inside the packed tensors, else 0
  int64_t diagonal;          // key under the diagonal of query 0
  float slope;               // ALiBi
};

FASTATTN_INLINE Head head_of(const AttentionParams& p, int64_t b, int64_t h) {
  Head s;
  s.b = b;
  s.h = h;
  s.hk = h / (p.nheads / p.nheads_k);
  s.q_start = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
  s.k_start = p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
  s.sq = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - s.q_start : p.seqlen_q;
  s.sk = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - s.k_start : p.seqlens_k ? p.seqlens_k[b] : p.seqlen_k;
  s.diagonal = p.upper_left ? 0 : s.sk - s.sq;
  s.slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride[0] + h * p.alibi_stride[1]] : 0.0f;
  return s;
}

// Keys of query m: [first_key, last_key), empty when first >= last.
FASTATTN_INLINE int64_t first_key(const AttentionParams& p, const Head& s, int64_t m) { return max64(0, m + s.diagonal - p.left); }
FASTATTN_INLINE int64_t last_key(const AttentionParams& p, const Head& s, int64_t m) {
  return min64(s.sk, m + s.diagonal + p.right + 1);
}

template <class T>
FASTATTN_INLINE const T* q_row(const AttentionParams& p, const Head& s, int64_t m) {
  return static_cast<const T*>(p.q) + s.b * p.q_stride[0] + (s.q_start + m) * p.q_stride[1] + s.h * p.q_stride[2];
}
template <class T>
FASTATTN_INLINE const T* key_row(const AttentionParams& p, const Head& s, const void* base, const int64_t (&stride)[3], int64_t n) {
  const T* rows = static_cast<const T*>(base) + s.hk * stride[2];
  if (p.block_table != nullptr) {
    int64_t block = p.block_table[s.b * p.block_table_stride + n / p.block_size];
    return rows + block * stride[0] + n % p.block_size * stride[1];
  }
  return rows + s.b * stride[0] + (s.k_start + n) * stride[1];
}

enum class Sight { none, some, all };

// Does the boolean mask let any, or every, query of [m0, m0 + rows) see a key of [n0, n0 + count)?
FASTATTN_INLINE Sight mask_sight(const AttentionParams& p, const Head& s, int64_t m0, int64_t rows, int64_t n0, int64_t count) {
  if (p.mask == nullptr) return Sight::all;
  const bool* base = p.mask + s.b * p.mask_stride[0] + s.h * p.mask_stride[1];
  int64_t sm = p.mask_stride[2], sn = p.mask_stride[3];
  if (sm == 0) rows = 1;
  if (sn == 0) count = 1;
  bool any = false, all = true;
  for (int64_t m = m0; m < m0 + rows; ++m) {
    const bool* row = base + m * sm + n0 * sn;
    if (sn == 1) {
      uint8_t any_row = 0, all_row = 1;
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(row);
      for (int64_t n = 0; n < count; ++n) {
        any_row |= bytes[n];
        all_row &= bytes[n];
      }
      any |= any_row != 0;
      all &= all_row != 0;
    } else {
      for (int64_t n = 0; n < count; ++n) {
        any |= row[n * sn];
        all &= row[n * sn];
      }
    }
    if (any && !all) return Sight::some;
  }
  return all ? Sight::all : any ? Sight::some : Sight::none;
}

// The keys of [n0, n0 + count) that a mask leaves when all queries share its row: [begin, end), `solid` when it hides nothing
// in between. Any other mask, or none, leaves them all.
struct KeySpan {
  int64_t begin, end;
  bool solid;
};
FASTATTN_INLINE KeySpan mask_span(const AttentionParams& p, const Head& s, int64_t n0, int64_t count) {
  KeySpan span{n0, n0 + count, p.mask == nullptr};
  int64_t sn = p.mask_stride[3];
  if (p.mask == nullptr || p.mask_stride[2] != 0) return span;
  const bool* row = p.mask + s.b * p.mask_stride[0] + s.h * p.mask_stride[1];
  span.end = min64(span.end, s.sk);
  while (span.begin < span.end && !row[span.begin * sn]) ++span.begin;
  while (span.begin < span.end && !row[(span.end - 1) * sn]) --span.end;
  span.solid = true;
  for (int64_t n = span.begin; n < span.end; ++n) span.solid &= row[n * sn];
  return span;
}

FASTATTN_INLINE vi bytes_to_cells(const bool* p, int64_t n) {
  typedef uint8_t vb __attribute__((vector_size(VL)));
  vb x = {};
  __builtin_memcpy(&x, p, n);
  return __builtin_convertvector(x, vi);
}
FASTATTN_INLINE vi pair_cells(const bool* p, int64_t n) { return bytes_to_cells(p, n); }
template <class T>
FASTATTN_INLINE vi pair_cells(const T* p, int64_t n) {
  return as_int(n == VL ? load(p) : load_n(p, n));
}
FASTATTN_INLINE int32_t pair_cell(const bool* p) { return *p; }
template <class T>
FASTATTN_INLINE int32_t pair_cell(const T* p) {
  float f = to_float(*p);
  int32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

// tile[n][lane] = source[m0 + lane][n0 + n] (mask or bias) for any strides; lanes past `rows` repeat the last row.
template <class T>
static __attribute__((noinline)) void load_pairs(const T* source, int64_t sm, int64_t sn, int64_t rows, int64_t count,
                                                 int32_t* tile) {
  if (sm == 0) {
    for (int64_t n = 0; n < count; ++n)
      for (int v = 0; v < kVecs; ++v) store_i(tile + n * kM + v * VL, splat_i(pair_cell(source + n * sn)));
  } else if (sn == 1) {
    for (int64_t lane = 0; lane < kM; lane += VL)
      for (int64_t n = 0; n < count; n += VL) {
        vi block[VL];
        int64_t width = min64(VL, count - n);
        for (int i = 0; i < VL; ++i) block[i] = pair_cells(source + min64(lane + i, rows - 1) * sm + n, width);
        transpose(block);
        for (int i = 0; i < width; ++i) store_i(tile + (n + i) * kM + lane, block[i]);
      }
  } else {
    for (int64_t n = 0; n < count; ++n)
      for (int64_t lane = 0; lane < kM; ++lane) tile[n * kM + lane] = pair_cell(source + min64(lane, rows - 1) * sm + n * sn);
  }
}

static void load_bias(const AttentionParams& p, const Head& s, int64_t m0, int64_t rows, int64_t n0, int64_t count, int32_t* tile) {
  const int64_t* st = p.bias_stride;
  int64_t at = s.b * st[0] + s.h * st[1] + m0 * st[2] + n0 * st[3];
  if (p.bias_dtype == 0)
    load_pairs(static_cast<const float*>(p.bias) + at, st[2], st[3], rows, count, tile);
  else if (p.bias_dtype == 1)
    load_pairs(static_cast<const bf16*>(p.bias) + at, st[2], st[3], rows, count, tile);
  else
    load_pairs(static_cast<const f16*>(p.bias) + at, st[2], st[3], rows, count, tile);
}

// e^(2x) - 1 without cancellation, then tanh = (e - 1) / (e + 1): accurate relative to the result near 0 too.
FASTATTN_INLINE vf tanh(vf x) {
  vf t = max(splat(-30.0f), min(splat(30.0f), x * splat(2.0f * kLog2e)));
  vf rounded = (t + splat(12582912.0f)) - splat(12582912.0f);
  vf f = t - rounded;
  vf p = fma(splat(1.326472720e-03f), f, splat(9.671512640e-03f));
  p = fma(p, f, splat(5.550733743e-02f));
  p = fma(p, f, splat(2.402224209e-01f));
  p = fma(p, f, splat(6.931471806e-01f)) * f;  // 2^f - 1
  vf power = as_float((__builtin_convertvector(rounded, vi) + 127) << 23);
  vf e = fma(p, power, power - splat(1.0f));
  vf y = e / (e + splat(2.0f));
  return select((vi)(x != x), x, y);
}

// The tile's buffers of one thread.
struct PairTiles {
  int32_t* mask;  // [BLOCK_N][kM], visible pairs are not 0
  int32_t* bias;  // [BLOCK_N][kM], float bits
};

// Everything a block of kM queries needs to know about itself.
struct Lanes {
  int64_t m0, rows;
  int64_t first[kM], last[kM];   // keys of each query
  int64_t begin, end;            // union over the lanes
  int64_t full_begin, full_end;  // intersection
};

FASTATTN_INLINE void make_lanes(const AttentionParams& p, const Head& s, int64_t m0, Lanes& lanes) {
  lanes.m0 = m0;
  lanes.rows = min64(kM, s.sq - m0);
  for (int64_t i = 0; i < kM; ++i) {
    int64_t m = m0 + min64(i, lanes.rows - 1);
    lanes.first[i] = first_key(p, s, m);
    lanes.last[i] = last_key(p, s, m);
  }
  // The band moves right with m, so the ends are at the first and last lane.
  lanes.begin = lanes.first[0];
  lanes.end = lanes.last[kM - 1];
  lanes.full_begin = lanes.first[kM - 1];
  lanes.full_end = lanes.last[0];
}

// The band of a block against a tile that starts at key n0, as compares of the key's index in the tile.
struct Band {
  vi first[kVecs], last[kVecs];
  // Against the keys [begin, end) of the tile.
  FASTATTN_INLINE Band of(const Lanes& lanes, int64_t n0, int64_t begin, int64_t end) {
    int32_t first_lane[kM], last_lane[kM];
    for (int lane = 0; lane < kM; ++lane) {
      first_lane[lane] = static_cast<int32_t>(max64(begin, min64(end, lanes.first[lane] - n0)));
      last_lane[lane] = static_cast<int32_t>(max64(begin, min64(end, lanes.last[lane] - n0)));
    }
    Band band;
    for (int v = 0; v < kVecs; ++v) {
      band.first[v] = load_i(first_lane + v * VL);
      band.last[v] = load_i(last_lane + v * VL);
    }
    return band;
  }
  // x where the lane sees the key, else -inf.
  inline __attribute__((always_inline)) vf cut(int v, int64_t key, vf x) const {
    vi n = splat_i(static_cast<int32_t>(key));
    return select((vi)(n >= first[v]) & (vi)(n < last[v]), x, splat(-kInfinity));
  }
};

FASTATTN_INLINE bool is_modified(const AttentionParams& p) {
  return p.softcap > 0.0f || p.alibi_slopes != nullptr || p.bias != nullptr || !(p.scale > 0.0f);
}

template <class T>
struct BiasCells {
  static constexpr int kPerCell = 4 / sizeof(T);
};
// The value of a cell of bias: a float, or one of the two 16-bit floats of a pair.
FASTATTN_INLINE vf cell_value(float, vi cell, int) { return as_float(cell); }
FASTATTN_INLINE vf cell_value(bf16, vi cell, int half) { return as_float(half == 0 ? cell << 16 : cell & (int32_t)0xffff0000); }
FASTATTN_INLINE vf cell_value(f16, vi cell, int half) {
  return widen_f16(__builtin_convertvector(half == 0 ? cell & 0xffff : (vi)((vu)cell >> 16), vh));
}

// x * scale + b; -inf where b hides the key, whatever x is.
FASTATTN_INLINE vf add_visible(vf x, vf scale, vf b) {
#if VB == 64
  __mmask16 seen = _mm512_cmp_ps_mask((__m512)b, _mm512_set1_ps(-kInfinity), _CMP_NEQ_UQ);
  return (vf)_mm512_mask3_fmadd_ps((__m512)x, (__m512)scale, (__m512)b, seen);
#else
  return select((vi)(b == splat(-kInfinity)), b, fma(x, scale, b));
#endif
}

// x * scale + bias, for a bias with rows of its own and no other option: transposed in registers and added at once. Keys past
// `seen` are padding. In natural units, or in log2 units if `log2`.
template <class T>
FASTATTN_INLINE void add_bias(const T* bias, int64_t stride, float scale, bool log2, const Lanes& lanes, const Band* band,
                              int64_t seen, int64_t count, float* tile, vf (&top)[kVecs]) {
  constexpr int kPack = BiasCells<T>::kPerCell;
  vf factor = splat(log2 ? scale * kLog2e : scale), unit = splat(kLog2e), hidden = splat(-kInfinity);
  for (int v = 0; v < kVecs; ++v) {
    vf most = hidden;
    for (int64_t n = 0; n < seen; n += kPack * VL) {
      vi block[VL];
      for (int i = 0; i < VL; ++i) {
        const T* row = bias + min64(v * VL + i, lanes.rows - 1) * stride + n;
        block[i] = row_cells<BiasCells<T>>(row, 0, seen - n);
      }
      transpose(block);
      int64_t width = min64(kPack * VL, seen - n);
      float* to = tile + n * kM + v * VL;
      auto add = [&](int64_t i, vf b) __attribute__((always_inline)) {
        if (log2) b = b * unit;
        vf x = add_visible(load(to + i * kM), factor, b);
        if (band != nullptr) x = band->cut(v, n + i, x);
        most = max(most, x);
        store(to + i * kM, x);
      };
      if (width == kPack * VL) {
#pragma GCC unroll 32
        for (int i = 0; i < kPack * VL; ++i) add(i, cell_value(T{}, block[i / kPack], i % kPack));
      } else {
        for (int64_t i = 0; i < width; ++i) add(i, cell_value(T{}, block[i / kPack], i % kPack));
      }
    }
    for (int64_t n = seen; n < count; ++n) store(tile + n * kM + v * VL, hidden);
    top[v] = max(top[v], most);
  }
}

// Applies the options to raw = k q in place. Afterwards visible scores are in log2 units when `modified` (multiply by 1),
// or in natural ones unless `log2` (multiply by log2 e), else still raw (multiply by scale * log2 e), and invisible ones -inf.
// Takes the running maximum of what it leaves. slopes, if not null, receives d score / d raw of the softcap (backward).
FASTATTN_INLINE void apply_options(const AttentionParams& p, const Head& s, const Lanes& lanes, int64_t n0, int64_t count,
                                   Sight sight, bool modified, float* tile, const PairTiles& pairs, vf (&top)[kVecs],
                                   float* softcap_slope, bool log2 = true) {
  int64_t seen = min64(count, s.sk - n0);  // rows past the sequence are padding of the tile
  bool masked = sight != Sight::all;
  bool banded = n0 < lanes.full_begin || n0 + count > lanes.full_end;
  if (masked) {
    const int64_t* st = p.mask_stride;
    load_pairs(p.mask + s.b * st[0] + s.h * st[1] + lanes.m0 * st[2] + n0 * st[3], st[2], st[3], lanes.rows, seen, pairs.mask);
  }
  Band band = Band::of(lanes, n0, 0, count);
  bool only_bias = p.bias != nullptr && !(p.softcap > 0.0f) && p.alibi_slopes == nullptr;
  if (only_bias && !masked && p.bias_stride[2] != 0 && p.bias_stride[3] == 1) {
    const int64_t* st = p.bias_stride;
    int64_t at = s.b * st[0] + s.h * st[1] + lanes.m0 * st[2] + n0;
    auto add = [&](auto* bias) {
      add_bias(bias + at, st[2], p.scale, log2, lanes, banded ? &band : nullptr, seen, count, tile, top);
    };
    if (p.bias_dtype == 0) return add(static_cast<const float*>(p.bias));
    if (p.bias_dtype == 1) return add(static_cast<const bf16*>(p.bias));
    return add(static_cast<const f16*>(p.bias));
  }
  if (p.bias != nullptr) load_bias(p, s, lanes.m0, lanes.rows, n0, seen, pairs.bias);
  vf distance[kVecs];  // from the diagonal to key n0
  for (int v = 0; v < kVecs; ++v)
    distance[v] = __builtin_convertvector(iota() + splat_i(static_cast<int32_t>(lanes.m0 + v * VL + s.diagonal - n0)), vf);
  float unit = log2 ? kLog2e : 1.0f;
  vf inner = splat(p.softcap > 0.0f ? p.scale / p.softcap : p.scale);
  for (int64_t n = 0; n < count; ++n) {
    for (int v = 0; v < kVecs; ++v) {
      float* at = tile + n * kM + v * VL;
      vf x = load(at);
      if (only_bias) {
        vf bias = n < seen ? as_float(load_i(pairs.bias + n * kM + v * VL)) : zero();
        x = add_visible(x, splat(p.scale * unit), bias * splat(unit));
      } else if (modified) {
        x = x * inner;
        if (p.softcap > 0.0f) {
          vf t = tanh(x);
          x = t * splat(p.softcap);
          if (softcap_slope != nullptr) store(softcap_slope + n * kM + v * VL, splat(1.0f) - t * t);
        }
        if (p.alibi_slopes != nullptr) {
          vf d = distance[v] - splat(static_cast<float>(n));
          x = x - splat(s.slope) * max(d, -d);
        }
        if (p.bias != nullptr && n < seen) {
          vf bias = as_float(load_i(pairs.bias + n * kM + v * VL));
          x = select((vi)(bias == splat(-kInfinity)), bias, x + bias);
        }
        x = x * splat(unit);
      }
      if (banded) x = band.cut(v, n, x);
      if (masked && n < seen) {
        vi visible = (vi)(load_i(pairs.mask + n * kM + v * VL) != 0);
        x = select(visible, x, splat(-kInfinity));
      }
      top[v] = max(top[v], x);
      store(at, x);
    }
  }
}

// keep[n][lane] = the factor of the probability: 0, or 1 / (1 - p). One Philox call serves four neighbouring keys.
FASTATTN_INLINE void apply_dropout(const AttentionParams& p, const Head& s, int64_t m0, int64_t n0, int64_t count, float* keep) {
  vu bh = (vu)splat_i(static_cast<int32_t>(s.b * p.nheads + s.h)), offset = (vu)splat_i(static_cast<int32_t>(p.philox_offset));
  vi threshold = splat_i(static_cast<int32_t>(p.dropout_threshold ^ 0x80000000u));
  int64_t begin = n0 - n0 % 4;
  for (int64_t n = begin; n < n0 + count; n += 4)
    for (int v = 0; v < kVecs; ++v) {
      vu query = (vu)(iota() + splat_i(static_cast<int32_t>(m0 + v * VL)));
      Philox draw = philox((vu)splat_i(static_cast<int32_t>(n >> 2)), query, bh, offset, p.philox_key[0], p.philox_key[1]);
      for (int i = 0; i < 4; ++i)
        if (n + i >= n0 && n + i < n0 + count) {
          vi dropped = (vi)((vi)(draw.word[i] ^ 0x80000000u) < threshold);  // unsigned compare
          store(keep + (n + i - n0) * kM + v * VL, select(dropped, zero(), splat(p.dropout_scale)));
        }
    }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
