// attention_weights: exp(score - lse) for every pair, one task per (batch, head, block of kM queries).
// The first half of attention_fwd, written out: for looking at attention maps, and for need_weights. Bound: the output.
#include "attention_scores.h"
#include "attention_tiles.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kBlockN = 128;

template <class T, class Cells>
void block_of_weights(const AttentionParams& p, int64_t b, int64_t h, int64_t m0) {
  Head s = head_of(p, b, h);
  if (m0 >= s.sq) return;
  int64_t cells = round_up(p.headdim, Cells::kPerCell) / Cells::kPerCell;
  float* at = static_cast<float*>(thread_scratch((cells * kM + kBlockN * (cells + 3 * kM) + 64) * 4));
  auto take = [&](int64_t n) {
    float* mine = at;
    at += round_up(n, 16);
    return mine;
  };
  float *q = take(cells * kM), *k_tile = take(kBlockN * cells), *scores = take(kBlockN * kM);
  PairTiles pairs{reinterpret_cast<int32_t*>(take(kBlockN * kM)), reinterpret_cast<int32_t*>(take(kBlockN * kM))};
  bool modified = is_modified(p);
  vf c = splat(modified ? 1.0f : p.scale * kLog2e);

  Lanes lanes;
  make_lanes(p, s, m0, lanes);
  rows_to_lanes<Cells>(q_row<T>(p, s, m0), p.q_stride[1], lanes.rows, p.headdim, q);
  float high[kM], low[kM], one[kM];
  for (int64_t i = 0; i < kM; ++i) {
    float lse = p.lse[s.b * p.lse_stride[0] + s.h * p.lse_stride[1] + s.q_start + m0 + min64(i, lanes.rows - 1)];
    double exact = -1.4426950408889634 * lse;
    high[i] = lse == -kInfinity ? -kInfinity : static_cast<float>(exact);
    low[i] = lse == -kInfinity ? 0.0f : static_cast<float>(exact - high[i]);
    one[i] = 1.0f;
  }
  T* out = static_cast<T*>(p.o) + s.b * p.o_stride[0] + (s.q_start + m0) * p.o_stride[1] + s.h * p.o_stride[2];
  KeyTiles<T, Cells> tiles(p, s, cells, 0, k_tile, nullptr);
  for (int64_t n0 = 0; n0 < s.sk; n0 += kBlockN) {
    int64_t seen = min64(kBlockN, s.sk - n0), count = round_up(seen, kRows);
    Sight sight = n0 < lanes.end && n0 + seen > lanes.begin ? mask_sight(p, s, m0, lanes.rows, n0, seen) : Sight::none;
    if (sight == Sight::none) {
      for (int64_t i = 0; i < lanes.rows; ++i) __builtin_memset(out + i * p.o_stride[1] + n0, 0, seen * sizeof(T));
      continue;
    }
    tiles.start(n0, seen);
    CellRows k = tiles.k();
    product_rows<Cells>(k.at, k.ld, q, kM, count, cells, scores, kM, false);
    vf top[kVecs];
    for (int v = 0; v < kVecs; ++v) top[v] = zero();
    apply_options(p, s, lanes, n0, count, sight, modified, scores, pairs, top, nullptr);
    for (int64_t n = 0; n < seen; ++n)
      for (int v = 0; v < kVecs; ++v) {
        float* x = scores + n * kM + v * VL;
        store(x, exp2<6>(fma(load(x), c, load(high + v * VL)) + load(low + v * VL)));
      }
    lanes_to_rows(scores, one, lanes.rows, seen, out + n0, p.o_stride[1]);
  }
}

template <class T, class Cells>
void weights(const AttentionParams& p) {
  int64_t blocks = round_up(p.seqlen_q, kM) / kM;
  parallel_for(p.nthreads, p.batch * p.nheads * blocks, [&](int64_t task) {
    int64_t head = task / blocks;
    block_of_weights<T, Cells>(p, head / p.nheads, head % p.nheads, task % blocks * kM);
  });
}

}  // namespace

// p.o is [batch, seqlen_q, nheads, seqlen_k] by strides, p.lse is read.
void attention_weights(const AttentionParams& p) {
  if (p.batch <= 0 || p.seqlen_q <= 0) return;
  if (p.dtype == 0) return weights<float, FloatCells>(p);
  if (p.dtype == 2) return weights<f16, FloatCells>(p);
#if defined(__AVX512BF16__)
  return weights<bf16, PairCells>(p);
#else
  return weights<bf16, FloatCells>(p);
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
