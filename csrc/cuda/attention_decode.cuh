#pragma once
#include <attention_decode_params.h>

#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/memory.cuh>
#include <tile/band.cuh>
#include <tile/decode.cuh>
#include <tile/lost.cuh>
#include <tile/product.cuh>
#include <tile/rows.cuh>
#include <tile/score.cuh>
#include <tile/sink.cuh>
#include <tile/softmax.cuh>
#include <tile/swizzle.cuh>
#include <tile/uniform.cuh>

// Which warp does what with a tile of kKeyWarps · kKeys keys: warp w multiplies rows 16 (w % kRowWarps) … by keys
// kKeys (w / kRowWarps) …, and copies the w-th share of the tile. With one row warp that is what it multiplies by, and warps
// do not wait for each other.
template <int kHeaddim, int kHeaddimV, int kRowWarps, int kKeyWarps, int kKeys, int kStages>
struct DecodeTile {
  static constexpr int kWarps = kRowWarps * kKeyWarps, kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowWarps, kBlockN = kKeyWarps * kKeys, kShare = kBlockN / kWarps;
  using Q = TileLayout<kRows, kHeaddim>;
  using K = TileLayout<kBlockN, kHeaddim>;
  using V = TileLayout<kBlockN, kHeaddimV>;
  static constexpr int kStageBytes = K::kBytes + V::kBytes;
  static constexpr int kPitch = kHeaddimV + 8;  // floats of a row of results: the rows of a store lie 8 banks apart
};

// The tiles [begin, end) of one split: as even as can be, over no more splits than have `least` tiles each.
__forceinline__ void share_of(int split, int tiles, int num_splits, int least, int& begin, int& end) {
  const int used = min(num_splits, max(tiles / least, 1));
  const int each = tiles / used, more = tiles % used;
  begin = min(split, used) * each + min(split, more);
  end = begin + (split < used ? each + (split < more ? 1 : 0) : 0);
}

// o and lse of 16 kRowWarps rows (queries times the heads of one group, so that keys are read once for all of these) over
// one split of the keys they see. What a split holds depends on the length of its own sequence only, which is read here.
// Grid: blocks_m · nheads_k · num_splits · batch, 32 kRowWarps kKeyWarps threads. Shared memory: q, 32 kRowWarps kHeaddim
// bytes, and kStages tiles of 2 kKeyWarps kKeys (kHeaddim + kHeaddimV) bytes, which the warps' results use afterwards.
// Bound by memory: 2 nheads_k (headdim + headdim_v) bytes per key; each of several splits also writes 4 (headdim_v + 1)
// bytes per row. 16 rows are 16 FLOP per byte, of about 125 that mma.sync can do on an H200. Under way per block are
// kStages - 1 tiles: at headdim 128 64 KB, in two blocks 3.5 times the 36 KB that 4.8 TB/s · 1 us / 132 multiprocessors ask
// for. Predicted: 88 to 92 % of the copy bandwidth; not measured.
// Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention, arXiv:2309.06180.
template <class T, int kHeaddim, int kHeaddimV, int kRowWarps, int kKeyWarps, int kKeys, int kStages>
__global__ void __launch_bounds__(32 * kRowWarps * kKeyWarps, kRowWarps* kKeyWarps <= 4 ? 2 : 1)
    attention_decode_kernel(const __grid_constant__ AttentionDecodeParams p) {
  using Tile = DecodeTile<kHeaddim, kHeaddimV, kRowWarps, kKeyWarps, kKeys, kStages>;
  using LayoutQ = typename Tile::Q;
  using LayoutK = typename Tile::K;
  using LayoutV = typename Tile::V;
  constexpr int kSteps = kHeaddim / 16, kColumns = kHeaddimV / 8;
  constexpr bool kQInRegisters = kHeaddim <= 128;
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int row_warp = warp % kRowWarps, key_warp = warp / kRowWarps;

  int id = blockIdx.x;
  const int block_m = p.blocks_m - 1 - id % p.blocks_m;  // the longest first where the diagonal cuts keys off
  id /= p.blocks_m;
  const int h_k = id % p.nheads_k;
  id /= p.nheads_k;
  const int split = id % p.num_splits, b = id / p.num_splits;
  const int group = p.nheads / p.nheads_k, rows = p.seqlen_q * group, row0 = block_m * Tile::kRows;

  Sequence s;
  s.b = b;
  s.h_k = h_k;
  s.h = h_k * group;
  s.first_q = s.first_k = 0;
  s.seqlen_q = p.seqlen_q;
  s.seqlen_k = uniform(min(max(p.cache_seqlens[b], 0) + p.seqlen_new, p.seqlen_k));
  s.diagonal = p.upper_left ? 0 : s.seqlen_k - s.seqlen_q;
  const int m0 = row0 / group, m1 = min((row0 + Tile::kRows - 1) / group + 1, p.seqlen_q);
  const Range range = key_range<Tile::kBlockN>(p, s, m0, m1);
  const int tiles = (max(range.hi - range.lo, 0) + Tile::kBlockN - 1) / Tile::kBlockN;
  int first_tile, last_tile;
  share_of(split, tiles, p.num_splits, p.least, first_tile, last_tile);
  const i64 part_row = static_cast<i64>(split) * p.part_rows + static_cast<i64>(b) * p.seqlen_q * p.nheads + s.h;
  if (first_tile == last_tile && split > 0) {
    for (int r = row0 + threadIdx.x; r < min(row0 + Tile::kRows, rows); r += Tile::kThreads) {
      p.part_lse[part_row + r / group * p.nheads + r % group] = -infinity();
    }
    return;
  }

  u8* const q_smem = shared_memory();         // T [kRows, kHeaddim]
  u8* const ring = q_smem + LayoutQ::kBytes;  // kStages times T [kBlockN, kHeaddim], T [kBlockN, kHeaddimV]
  const CacheSequence cache = cache_sequence(p, b);
  const T* const q = static_cast<const T*>(p.q) + b * p.q_stride[0] + s.h * p.q_stride[2];
  const T* const k = static_cast<const T*>(p.k) + h_k * p.k_stride[2];
  const T* const v = static_cast<const T*>(p.v) + h_k * p.v_stride[2];
  const bool aligned = p.aligned != 0;
  const int lo = max(0, m0 + s.diagonal - p.left);  // the first key that is seen, within its tile

  for (int cell = threadIdx.x; cell < Tile::kRows * kHeaddim / 8; cell += Tile::kThreads) {
    const int row = cell / (kHeaddim / 8), chunk = cell % (kHeaddim / 8), r = row0 + row;
    const bool valid = r < rows && chunk * 8 < p.headdim;
    const T* from = valid ? q + (r / group) * p.q_stride[1] + (r % group) * p.q_stride[2] + chunk * 8 : q;
    if (aligned) {
      cp_async_16(q_smem + LayoutQ::at(row, chunk), from, valid);
    } else {
      store_shared_16(q_smem + LayoutQ::at(row, chunk), gather_8(from, valid ? p.headdim - chunk * 8 : 0));
    }
  }
  // The lanes look up where their keys lie one tile before they copy it, so that no copy waits for the block table.
  int n_next = range.lo + first_tile * Tile::kBlockN + warp * Tile::kShare + lane % Tile::kShare, write = 0;
  int left_to_copy = last_tile - first_tile;
  CacheSequence::Place next = {0, 0};
  if (n_next < range.hi) next = cache.find(n_next);
  auto copy_next = [&]() {
    if (left_to_copy > 0) {
      u8* const stage = ring + write * Tile::kStageBytes;
      write = write + 1 == kStages ? 0 : write + 1;
      --left_to_copy;
      const bool live = n_next >= lo && n_next < range.hi;
      const T* const k_row = live ? row_at(k, p.k_stride, next) : nullptr;
      const T* const v_row = live ? row_at(v, p.v_stride, next) : nullptr;
      n_next += Tile::kBlockN;
      if (n_next < range.hi) next = cache.find(n_next);
      copy_placed_rows<LayoutK, Tile::kShare>(stage, warp * Tile::kShare, k_row, p.headdim, aligned);
      copy_placed_rows<LayoutV, Tile::kShare>(stage + LayoutK::kBytes, warp * Tile::kShare, v_row, p.headdim_v, aligned);
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) copy_next();

  // Of this thread's two rows, 8 apart: query, the keys it sees, and how scores of its head are made.
  int m[2];
  Span seen[2];
  ScoreRule rule[2];
  float top[2], total[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row0 + 16 * row_warp + lane / 4 + 8 * i, h = s.h + r % group;
    Sequence of_row = s;
    of_row.h = h;
    m[i] = r / group;  // seqlen_q for rows that do not exist, which see nothing
    seen[i] = span_of(p, s, m[i], 0);
    rule[i] = score_rule(p, of_row);
    top[i] = split == 0 && key_warp == 0 && r < rows ? sink_of<T>(p, h) : -infinity();
    total[i] = top[i] == -infinity() || lane % 4 != 0 ? 0.0f : 1.0f;
  }
  const bool folded = p.softcap == 0.0f && p.alibi_slopes == nullptr && p.scale > 0.0f;
  const float factor = folded ? rule[0].scale : 1.0f;

  float acc[kColumns][4];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[c][e] = 0.0f;
  }
  const int lane_q = LayoutQ::lane_a(), lane_k = LayoutK::lane_b(), lane_v = LayoutV::lane_a();
  const bool busy = row0 + 16 * row_warp < rows;
  u32 q_reg[kQInRegisters ? kSteps : 1][4];
  cp_async_wait<kStages - 2>();
  __syncthreads();
  if constexpr (kQInRegisters) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_a<LayoutQ>(q_reg[step], q_smem, lane_q, 16 * row_warp, step);
  }

  int read = 0;
#pragma unroll 1
  for (int tile = first_tile; tile < last_tile; ++tile) {
    cp_async_wait<kStages - 2>();
    if constexpr (kRowWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    copy_next();
    const u8* const k_smem = ring + read * Tile::kStageBytes;
    const u8* const v_smem = k_smem + LayoutK::kBytes;
    read = read + 1 == kStages ? 0 : read + 1;
    if (!busy) continue;

    float score[kKeys / 8][4];  // [16, kKeys]
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) score[j][e] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (!kQInRegisters) load_a<LayoutQ>(q_reg[0], q_smem, lane_q, 16 * row_warp, step);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        u32 both[4];
        load_b<LayoutK>(both, k_smem, lane_k, key_warp * kKeys + 16 * j, step);
        mma_m16n16k16<T>(score[2 * j], score[2 * j + 1], q_reg[kQInRegisters ? step : 0], both);
      }
    }
    const int n0 = range.lo + tile * Tile::kBlockN + key_warp * kKeys, n = n0 + 2 * (lane % 4);
    if (!folded) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int distance = m[e / 2] + s.diagonal - (n + 8 * j + e % 2);
          score[j][e] = log2_score(rule[e / 2], score[j][e], static_cast<float>(distance));
        }
      }
    }
    if (!range.whole(n0, kKeys)) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!seen[e / 2].holds(n + 8 * j + e % 2)) score[j][e] = -infinity();
        }
      }
    }
    float share[2];
    online_softmax(score, top, total, share, factor);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[c][e] *= share[e / 2];
    }
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      u32 weight[4];
      pack_a<T>(weight, score, j);
#pragma unroll
      for (int step = 0; step < kHeaddimV / 16; ++step) {
        u32 both[4];
        load_b_transposed<LayoutV>(both, v_smem, lane_v, key_warp * kKeys + 16 * j, step);
        mma_m16n16k16<T>(acc[2 * step], acc[2 * step + 1], weight, both);
      }
    }
  }

  // The warps that share rows leave their results in the ring; then each row is one warp's, 8 columns a lane.
  cp_async_wait<0>();
  __syncthreads();
  float* const results = reinterpret_cast<float*>(ring);           // [kWarps, 16, kPitch]
  float* const tops = results + Tile::kWarps * 16 * Tile::kPitch;  // [kWarps, 16]
  float* const totals = tops + Tile::kWarps * 16;                  // [kWarps, 16]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + lane / 4 + 8 * i;
    total[i] = row_sum(total[i]);
    if (lane % 4 == 0) {
      tops[row] = top[i];
      totals[row] = total[i];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      *reinterpret_cast<float2*>(results + row * Tile::kPitch + 8 * c + 2 * (lane % 4)) =
          make_float2(acc[c][2 * i], acc[c][2 * i + 1]);
    }
  }
  __syncthreads();
  const int d = 8 * lane;
#pragma unroll 1
  for (int row = warp; row < Tile::kRows && row0 + row < rows; row += Tile::kWarps) {
    const int r = row0 + row;
    float row_top = -infinity(), row_total = 0.0f, x[8];
#pragma unroll
    for (int w = 0; w < kKeyWarps; ++w) row_top = fmaxf(row_top, tops[row + w * Tile::kRows]);
    const float shift = row_top == -infinity() ? 0.0f : row_top;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < kKeyWarps; ++w) {
      const int from = row + w * Tile::kRows;  // key warp w's results of this row
      const float weight = exp2_approx(tops[from] - shift);
      row_total = fmaf(totals[from], weight, row_total);
      if (d < kHeaddimV) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = fmaf(results[from * Tile::kPitch + d + i], weight, x[i]);
      }
    }
    const int h = s.h + r % group;
    if (p.seqlen_q > 1) {  // else all rows see the same keys, and nothing that is not seen was read
      bool finite = true;
#pragma unroll
      for (int i = 0; i < 8; ++i) finite = finite && is_finite(x[i]);
      if (!__all_sync(0xffffffffu, finite)) {
        const Span keys = span_of(p, s, r / group, 0);
        Sequence of_row = s;
        of_row.h = h;
        row_top = split == 0 ? sink_of<T>(p, h) : -infinity();
        row_total = row_top == -infinity() ? 0.0f : 1.0f;
        attend_row<T>(p, cache, q + r / group * p.q_stride[1] + r % group * p.q_stride[2], k, v, r / group + s.diagonal,
                      max(keys.first, range.lo + first_tile * Tile::kBlockN), min(keys.last, range.lo + last_tile * Tile::kBlockN),
                      score_rule(p, of_row), x, row_top, row_total);
      }
    }
    const float inverse = row_total == 0.0f ? 0.0f : rcp_approx(row_total);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= inverse;
    const i64 place = static_cast<i64>(r / group) * p.nheads + r % group;
    if (p.part == nullptr) {
      const i64 o_row = (static_cast<i64>(b) * p.seqlen_q * p.nheads + s.h + place) * p.headdim_v;
      if (d < p.headdim_v) store_pack(static_cast<T*>(p.o) + o_row + d, from_floats<T>(x));
      if (lane == 0) p.lse[(static_cast<i64>(b) * p.nheads + h) * p.seqlen_q + r / group] = log_sum(row_top, row_total);
    } else {
      if (d < p.headdim_v) store_pack(p.part + (part_row + place) * p.headdim_v + d, from_floats<float>(x));
      if (lane == 0) p.part_lse[part_row + place] = row_total == 0.0f ? -infinity() : row_top + log2_approx(row_total);
    }
  }
}
