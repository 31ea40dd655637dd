// The pairs of the Hopper backward, on accumulators of wgmma, where x[4 j + 2 r + e] belongs to row 8 r and column 8 j + e counted
// from the thread's first. Transposed accumulators have keys as rows and queries as columns, the others have it the other way
// round; which one it is, `Lse` and `Delta` say: how a thread finds the numbers of its queries.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/math.cuh>
#include <ptx/stmatrix.cuh>
#include <tile/band.cuh>
#include <tile/philox.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>

// Where dq's sums of one tile of BLOCK_M queries lie: slabs of 64 rows by 64 columns, rows first, each as the registers of the
// warpgroup that computed it hold it, four at a time: [8 groups of 8 columns][128 threads][4].
template <int BLOCK_M, int HEADDIM>
struct DqTile {
  static constexpr int kSlab = 64 * 64, kSlabs = BLOCK_M / 64 * (HEADDIM / 64), kFloats = kSlab * kSlabs;
  static constexpr int kRowSlabs = BLOCK_M / 64;
};

// The number in dq_sums of the tile of head h that begins with query m0. Tiles of a sequence are consecutive, and sequences do not
// share any.
template <int BLOCK_M, class Params>
__forceinline__ i64 dq_tile(const Params& p, const Sequence& s, int h, int m0) {
  i64 head = p.cu_seqlens_q != nullptr ? h : static_cast<i64>(s.b) * p.nheads + h;
  int before = p.cu_seqlens_q != nullptr ? s.first_q / BLOCK_M + s.b : 0;
  return head * p.blocks_m + before + m0 / BLOCK_M;
}

// The queries [first, last) that see key n, counted from query m on; none for a key that does not exist.
template <class Params>
__forceinline__ Span queries_of(const Params& p, const Sequence& s, int n, int m) {
  int aligned = n - s.diagonal - m;
  return {max(-m, aligned - p.right), n < s.seqlen_k ? min(s.seqlen_q - m, aligned + p.left + 1) : -m};
}

// What a call has beyond q·k · scale within the band.
constexpr u32 kGeneral = 1;  // softcap or ALiBi
constexpr u32 kMask = 2;
constexpr u32 kBias = 4;
constexpr u32 kDropout = 8;

// lse or delta of the four pairs 4 j … 4 j + 3. Queries are columns: these lie in shared memory, `from` that of the first one.
struct OfColumns {
  static constexpr bool kKeysAreRows = true;
  const float* from;
  __forceinline__ void get(float (&x)[4], int j) const {
    float2 found = *reinterpret_cast<const float2*>(from + 8 * j);
    x[0] = x[2] = found.x, x[1] = x[3] = found.y;
  }
};
// Queries are rows: a thread has two.
struct OfRows {
  static constexpr bool kKeysAreRows = false;
  float first, second;
  __forceinline__ OfRows(const float* from) : first(from[0]), second(from[8]) {}
  __forceinline__ void get(float (&x)[4], int) const { x[0] = x[1] = first, x[2] = x[3] = second; }
};
// How far the query and the key of register i lie behind the thread's first.
template <bool kKeysAreRows>
__forceinline__ int query_step(int i) {
  return kKeysAreRows ? i / 4 * 8 + (i & 1) : (i >> 1 & 1) * 8;
}
template <bool kKeysAreRows>
__forceinline__ int key_step(int i) {
  return query_step<!kKeysAreRows>(i);
}

// A bit for each of kCount registers: may this pair be seen?
template <int kCount>
struct Seen {
  u32 bits[(kCount + 31) / 32];
  __forceinline__ bool operator[](int i) const { return (bits[i / 32] >> i % 32 & 1) != 0; }
};

// By position, for keys from n and queries from m on.
template <int kCount, bool kKeysAreRows, class Params>
__forceinline__ Seen<kCount> seen_by_position(const Params& p, const Sequence& s, int n, int m) {
  const Span span[2] = {kKeysAreRows ? queries_of(p, s, n, m) : span_of(p, s, m, n),
                        kKeysAreRows ? queries_of(p, s, n + 8, m) : span_of(p, s, m + 8, n)};
  Seen<kCount> seen = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (span[i >> 1 & 1].holds(i / 4 * 8 + (i & 1))) seen.bits[i / 32] |= 1u << i % 32;
  }
  return seen;
}

// P of a tile of raw products, in their place; lse is in units of log 2.
template <int kCount, class Lse>
__forceinline__ void probabilities(float (&s)[kCount], float scale, const Lse& lse) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    float l[4];
    lse.get(l, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[4 * j + e] = exp2_approx(fmaf(s[4 * j + e], scale, -l[e]));
  }
}

template <int kCount>
__forceinline__ void hide(float (&x)[kCount], const Seen<kCount>& seen) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = seen[i] ? x[i] : 0.0f;
}

// dS = P (dP - delta) in the place of dP.
template <int kCount, class Delta>
__forceinline__ void score_gradients(float (&dp)[kCount], const float (&p)[kCount], const Delta& delta) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    float d[4];
    delta.get(d, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[4 * j + e] = p[4 * j + e] * (dp[4 * j + e] - d[e]);
  }
}

// A bias and a softcap: the bias is added behind it, so that dbias is dS without the softcap's derivative.
template <u32 kPairs>
constexpr bool kTwoGradients = (kPairs & kBias) != 0 && (kPairs & kGeneral) != 0;

// For calls with kPairs: P with the dropped pairs at 0 into `weights` (packed pairs of columns, as the next product's operand),
// into s what dS multiplies, P times the softcap's derivative, its sign set where the pair is dropped. With kTwoGradients the
// derivative stands apart. `seen` loses what the mask or a bias of -inf hides; these are read where position shows the pair.
template <class T, u32 kPairs, int kCount, class Lse, class Params>
__forceinline__ void pair_probabilities(float (&s)[kCount], float (&derivatives)[kCount], u32 (&weights)[kCount / 2],
                                        Seen<kCount>& seen, const Params& p, const Sequence& sequence, const ScoreRule& rule,
                                        const Lse& lse, int n, int m) {
  constexpr bool kKeysAreRows = Lse::kKeysAreRows;
  const u32 head = sequence.b * p.nheads + sequence.h;
  Philox philox = {};
  if constexpr (kPairs & kDropout) philox = load_philox(p.philox);
  const Pairs<u8> mask = pairs_of<u8>(p.mask, p.mask_stride, sequence);
  const i64 bias = sequence.b * p.bias_stride[0] + sequence.h * p.bias_stride[1];
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    float l[4];
    lse.get(l, j);
    u32 word[4] = {};
    if constexpr (kPairs & kDropout) {
      const int row = (threadIdx.x & 31) >> 2, column = 2 * (threadIdx.x & 3);
      uint4 words;
      if constexpr (kKeysAreRows) {
        words = philox_fragment_transposed(philox, n - row, m + 8 * j - column, head);
      } else {
        words = philox_fragment(philox, n + 8 * j - column, m - row, head);
      }
      word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
    }
    float weight[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = 4 * j + e, m_i = m + query_step<kKeysAreRows>(i), n_i = n + key_step<kKeysAreRows>(i);
      bool visible = seen[i];
      float score = s[i] * rule.scale, derivative = 1.0f;
      if constexpr (kPairs & kGeneral) {
        if (rule.cap != 0.0f) {
          float tanh = tanh_by_exp(score);
          derivative = 1.0f - tanh * tanh;
          score = rule.cap * tanh;
        }
        score -= rule.slope * fabsf(static_cast<float>(m_i + sequence.diagonal - n_i));
      }
      if constexpr (kPairs & kMask) {
        if (visible) visible = mask.at(m_i, n_i) != 0;
      }
      if constexpr (kPairs & kBias) {
        if (visible) {
          i64 at = bias + m_i * p.bias_stride[2] + n_i * p.bias_stride[3];
          float x = p.bias_float ? static_cast<const float*>(p.bias)[at] : to_float(static_cast<const T*>(p.bias)[at]);
          visible = x != -infinity();
          score = fmaf(x, kLog2e, score);
        }
      }
      if constexpr (kPairs & (kMask | kBias)) {
        if (!visible) seen.bits[i / 32] &= ~(1u << i % 32);
      }
      float probability = visible ? exp2_approx(score - l[e]) : 0.0f;
      bool dropped = kPairs & kDropout && word[e] < p.dropout_threshold;
      weight[e] = dropped ? 0.0f : probability;
      if constexpr (kTwoGradients<kPairs>) {
        derivatives[i] = derivative;
        derivative = 1.0f;
      }
      s[i] = __uint_as_float(__float_as_uint(probability * derivative) | (dropped ? 0x80000000u : 0u));
    }
    weights[2 * j] = pack<T>(weight[0], weight[1]);
    weights[2 * j + 1] = pack<T>(weight[2], weight[3]);
  }
}

// dS of the same in the place of dP, and into dbias.
template <u32 kPairs, int kCount, class Delta, class Params>
__forceinline__ void pair_gradients(float (&dp)[kCount], const float (&s)[kCount], const float (&derivatives)[kCount],
                                    const Seen<kCount>& seen, const Params& p, const Sequence& sequence, const Delta& delta, int n,
                                    int m) {
  const i64 dbias = sequence.b * p.dbias_stride[0] + sequence.h * p.dbias_stride[1];
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    float d[4];
    delta.get(d, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = 4 * j + e;
      float gradient = dp[i], probability = s[i];
      if constexpr (kPairs & kDropout) {
        gradient = __float_as_uint(probability) >> 31 != 0 ? 0.0f : gradient * p.dropout_scale;
        probability = fabsf(probability);
      }
      gradient = probability * (gradient - d[e]);
      dp[i] = seen[i] ? (kTwoGradients<kPairs> ? gradient * derivatives[i] : gradient) : 0.0f;
      if constexpr (kPairs & kBias) {
        const int m_i = m + query_step<Delta::kKeysAreRows>(i), n_i = n + key_step<Delta::kKeysAreRows>(i);
        if (p.dbias != nullptr && seen[i]) p.dbias[dbias + m_i * p.dbias_stride[2] + n_i * p.dbias_stride[3]] = gradient;
      }
    }
  }
}

// An accumulator as the next product's operand: columns [16 i, 16 i + 16) are registers 4 i … 4 i + 3.
template <class T, int kCount>
__forceinline__ void pack_pairs(u32 (&a)[kCount / 2], const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) a[i] = pack<T>(x[2 * i], x[2 * i + 1]);
}

// This warp's 16 rows of packed pairs into a tile in `Layout`; from: where its first piece goes, pairs_at<Layout>(row, chunk) for
// rows from `row` and columns from 8 chunk on.
template <class Layout>
__forceinline__ int pairs_at(int row, int chunk) {
  int lane = threadIdx.x & 31;
  return Layout::at(row + (lane & 15), chunk + (lane >> 4));
}
template <class Layout, int kCount>
__forceinline__ void put_pairs(u8* tile, const u32 (&a)[kCount], int from) {
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const u32 r[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]};
    stmatrix_x4(tile + Layout::move(from, 0, i), r);
  }
}
