#pragma once
#include <rope_params.h>

#include <tile/rows.cuh>

constexpr int kRopeThreads = 128;
constexpr int kRopeHeads = 4;  // heads that a thread has under way

// (a, b) -> (a c - b s, b c + a s), each with one fused and one rounded product, so that every path gives the same bits.
__forceinline__ void rotate(float& a, float& b, float c, float s) {
  const float turned = fmaf(a, c, -__fmul_rn(b, s));
  b = fmaf(b, c, __fmul_rn(a, s));
  a = turned;
}

// The pairs of two packs: element e of the one and of the other, or (paired_within) the elements 2i and 2i + 1 of each.
template <class T, int kWidth>
__forceinline__ void rotate(Pack<T, kWidth>& low, Pack<T, kWidth>& high, const float (&c)[kWidth], const float (&s)[kWidth],
                            bool paired_within) {
  float a[kWidth], b[kWidth];
  to_floats(a, low);
  to_floats(b, high);
  if (kWidth > 1 && paired_within) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      rotate(a[2 * i], a[2 * i + 1], c[i], s[i]);
      rotate(b[2 * i], b[2 * i + 1], c[kWidth / 2 + i], s[kWidth / 2 + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rotate(a[i], b[i], c[i], s[i]);
  }
  low = from_floats<T>(a);
  high = from_floats<T>(b);
}

// The table's entries for the pairs of a thread's two packs, the first of which starts at element d of the head.
template <class W, int kWidth>
__forceinline__ void load_table(float (&y)[kWidth], const W* row, u32 d, u32 half, bool paired_within) {
  if constexpr (kWidth > 1) {
    if (paired_within) {
      float low[kWidth / 2], high[kWidth / 2];
      to_floats(low, load_pack<W, kWidth / 2>(row + d / 2));
      to_floats(high, load_pack<W, kWidth / 2>(row + (half + d) / 2));
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) {
        y[i] = low[i];
        y[kWidth / 2 + i] = high[i];
      }
      return;
    }
  }
  to_floats(y, load_pack<W, kWidth>(row + d));
}

// All heads of q and k at some positions. A thread owns two packs of kWidth elements, `half` elements apart, of every head
// that it works on: four heads at once, with the same cosines and sines in its registers. `lanes` threads cover a head,
// head_lanes such groups the heads of a position; elements past 2 · half are copied.
// Grid: cdiv(batch · seqlen, 128 / (lanes · head_lanes)). Shared memory: none.
// Bound by memory: 2 · sizeof(T) bytes per element of q and k by 16-byte accesses (kWidth > 1), and a row of the tables per
// position, 4 · half · sizeof(W) bytes in all. 128 bytes per thread are under way. 92 % of the copy bandwidth by analysis,
// not measured. Su et al., arXiv:2104.09864.
template <class T, class W, int kWidth>
__global__ void __launch_bounds__(kRopeThreads, 5) rope_kernel(const __grid_constant__ RopeParams p) {
  const u32 lane = threadIdx.x % p.lanes, group = threadIdx.x / p.lanes, head_lane = group % p.head_lanes;
  const u32 positions = kRopeThreads / (p.lanes * p.head_lanes), row = blockIdx.x * positions + group / p.head_lanes;
  if (group / p.head_lanes >= positions || row >= p.rows) return;
  const u32 b = row / p.seqlen, m = row % p.seqlen, heads = p.nheads + p.nheads_k;
  i64 position = m;
  if (p.ids != nullptr) {
    const i64 at = b * p.ids_stride[0] + m * p.ids_stride[1];
    position = p.ids_wide ? static_cast<const i64*>(p.ids)[at] : static_cast<const int*>(p.ids)[at];
  }
  const bool known = position >= 0 && position < p.table_rows;
  const W* cos = static_cast<const W*>(p.cos) + (known ? b * p.cos_stride[0] + position * p.cos_stride[1] : 0);
  const W* sin = static_cast<const W*>(p.sin) + (known ? b * p.sin_stride[0] + position * p.sin_stride[1] : 0);
  const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + m * p.q_stride[1];
  const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + m * p.k_stride[1];
  T* q_out = static_cast<T*>(p.q_out) + b * p.q_out_stride[0] + m * p.q_out_stride[1];
  T* k_out = static_cast<T*>(p.k_out) + b * p.k_out_stride[0] + m * p.k_out_stride[1];
  auto source = [&](u32 h) { return h < p.nheads ? q + h * p.q_stride[2] : k + (h - p.nheads) * p.k_stride[2]; };
  auto target = [&](u32 h) { return h < p.nheads ? q_out + h * p.q_out_stride[2] : k_out + (h - p.nheads) * p.k_out_stride[2]; };

  // Element by element the two packs are one pair; wider ones hold whole pairs when these are neighbours.
  const bool apart = kWidth > 1 || !p.interleaved;
  const u32 step = apart ? 1 : 2, gap = apart ? p.half : 1;
  for (u32 first = lane * kWidth; first < p.half; first += p.lanes * kWidth) {
    float c[kWidth], s[kWidth];
    const u32 d = first * step;
    for (u32 h = head_lane; h < heads; h += kRopeHeads * p.head_lanes) {
      Pack<T, kWidth> low[kRopeHeads], high[kRopeHeads];
#pragma unroll
      for (int i = 0; i < kRopeHeads; ++i) {
        if (h + i * p.head_lanes < heads) {
          const T* from = source(h + i * p.head_lanes) + d;
          low[i] = load_pack<T, kWidth, true>(from);
          high[i] = load_pack<T, kWidth, true>(from + gap);
        }
      }
      if (h == head_lane) {  // behind the heads, so that both are under way
        if (known) {
          load_table(c, cos, first, p.half, p.interleaved);
          load_table(s, sin, first, p.half, p.interleaved);
        }
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          c[e] = known ? c[e] : __uint_as_float(0x7fffffffu);
          s[e] = known ? s[e] * p.sign : __uint_as_float(0x7fffffffu);
        }
      }
#pragma unroll
      for (int i = 0; i < kRopeHeads; ++i) {
        if (h + i * p.head_lanes < heads) {
          T* to = target(h + i * p.head_lanes) + d;
          rotate(low[i], high[i], c, s, p.interleaved);
          store_pack(to, low[i]);
          store_pack(to + gap, high[i]);
        }
      }
    }
  }
  for (u32 h = head_lane; h < heads; h += p.head_lanes) {
    const u32 headdim = h < p.nheads ? p.headdim : p.headdim_k;
    for (u32 d = 2 * p.half + lane * kWidth; d < headdim; d += p.lanes * kWidth)
      store_pack(target(h) + d, load_pack<T, kWidth, true>(source(h) + d));
  }
}
