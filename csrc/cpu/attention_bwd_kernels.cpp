// attention_bwd: dq, dk, dv (and dbias, dsinks) from do, o and lse; P is recomputed tile by tile.
// One task per (batch, key head, chunk of keys): K and V are packed once, every query head of the group and every block
// of queries passes over them, dk and dv accumulate in fp32 in the task's scratch, dq in registers and L1. Five products
// per tile, S = K q^T, dP = V do^T, dq += K^T dS, dv += P do, dk += dS q, all through gemm.h with lanes over queries
// (first three) or head columns (last two). With pairs of bf16 a block of queries is only kM / 2 steps of the last two, which
// pay for reading and writing dv and dk; so two blocks of queries go through a tile together and share them. The partition depends
// on shapes only, so results do not depend on the thread count. Scratch: 5 * chunk * headdim floats. Bound: multiply-adds, 10 *
// headdim FLOPs per visible pair. Dao, FlashAttention-2, arXiv:2307.08691, Algorithm 2.
#include <new>

#include "attention_scores.h"
#include "attention_tiles.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kBlockN = 128;

// Which loops run inside one task: a bias gradient that is summed over batch or heads is summed in a fixed order.
struct Plan {
  int64_t batch_tasks, head_tasks, chunks, chunk_keys;
};

// Rows of dq over all sequences: the partial sums of chunks are stored by it.
FASTATTN_INLINE int64_t query_rows(const AttentionParams& p) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[p.batch] : p.batch * p.seqlen_q;
}

Plan make_plan(const AttentionBwdParams& p) {
  Plan plan;
  bool merge_batch = p.dbias != nullptr && p.dbias_stride[0] == 0, merge_heads = p.dbias != nullptr && p.dbias_stride[1] == 0;
  plan.batch_tasks = merge_batch ? 1 : p.batch;
  plan.head_tasks = merge_heads ? 1 : p.nheads_k;
  int64_t tasks = plan.batch_tasks * plan.head_tasks, most = max64(1, p.seqlen_k / 512);
  // Each chunk has its own partial sum of dq: not more of them than half a gigabyte holds.
  constexpr int64_t kPartialFloats = 128 << 20;
  most = min64(most, kPartialFloats / max64(1, p.nheads * query_rows(p) * p.headdim));
  bool keys_summed = p.dbias != nullptr && p.dbias_stride[3] == 0;
  plan.chunks = tasks >= 16 || keys_summed ? 1 : max64(1, min64(most, (16 + tasks - 1) / tasks));
  plan.chunk_keys = round_up((p.seqlen_k + plan.chunks - 1) / plan.chunks, kBlockN);
  plan.chunks = max64(1, (p.seqlen_k + plan.chunk_keys - 1) / max64(1, plan.chunk_keys));
  return plan;
}

FASTATTN_INLINE int64_t query_row(const AttentionParams& p, const Head& s, int64_t m) {
  return (p.cu_seqlens_q ? s.q_start : s.b * p.seqlen_q) + m;
}

template <class T>
FASTATTN_INLINE T* out_row(void* base, const int64_t (&stride)[3], int64_t b, int64_t row, int64_t h) {
  return static_cast<T*>(base) + b * stride[0] + row * stride[1] + h * stride[2];
}

// delta[lane] = rowsum(do * o) - dlse.
template <class T>
FASTATTN_INLINE float delta_of(const AttentionBwdParams& p, const Head& s, int64_t m) {
  const T* dout = out_row<T>(const_cast<void*>(p.dout), p.do_stride, s.b, s.q_start + m, s.h);
  const T* o = out_row<T>(p.o, p.o_stride, s.b, s.q_start + m, s.h);
  vf sum = zero();
  int64_t d = 0;
  for (; d + VL <= p.headdim_v; d += VL) sum = fma(load(dout + d), load(o + d), sum);
  if (d < p.headdim_v) sum = fma(load_n(dout + d, p.headdim_v - d), load_n(o + d, p.headdim_v - d), sum);
  float delta = reduce_add(sum);
  if (p.dlse != nullptr) delta -= p.dlse[s.b * p.dlse_stride[0] + s.h * p.dlse_stride[1] + s.q_start + m];
  return delta;
}
FASTATTN_INLINE float lse_of(const AttentionParams& p, const Head& s, int64_t m) {
  return p.lse[s.b * p.lse_stride[0] + s.h * p.lse_stride[1] + s.q_start + m];
}

template <class T, class Cells>
struct Backward {
  // Blocks of queries that share the products over queries: as many as make kM steps of them.
  static constexpr int kBlocks = Cells::kPerCell;
  static constexpr int64_t kPackedRows = kM / Cells::kPerCell, kPackedRowCells = kBlocks * kPackedRows;
  static constexpr int kDegree = sizeof(T) == 2 && !is_f16<T> ? 3 : 6;

  const AttentionBwdParams& p;
  const Plan& plan;
  float* dq_partial;  // [chunks][nheads][rows of dq][headdim], null with one chunk
  int64_t cells, cells_v, groups, lanes_d, lanes_v;
  float c;
  bool modified;
  // Packed keys of the chunk, per tile of kBlockN: cells by rows, K also by groups; and the accumulators.
  float *k_cells, *k_groups, *v_cells, *dk, *dv;
  uint8_t *k_not_finite, *begun;  // per tile; begun: dk and dv hold sums, else nothing yet
  // Blocks of kM queries.
  struct Queries {
    Lanes lanes;
    float *q_lanes, *do_lanes, *dq_lanes, *shift, *shift_low, *delta;
  } block[kBlocks];
  float *q_rows, *do_rows;  // of all blocks, one after the other
  // One tile.
  float *scores, *dp, *p_rows, *ds_rows, *ds_pairs, *keep, *slope;
  PairTiles pairs;
  // The rows of the next block of queries, or of the next task with its keys, on their way into L2.
  Ahead coming[5];
  int64_t step_rows = 0;

  template <class Take>
  void layout(Take&& take) {
    int64_t keys = plan.chunk_keys;
    bool options = p.mask != nullptr || p.bias != nullptr || p.dropout || p.softcap > 0.0f;
    k_cells = take(keys * cells);
    k_groups = take(keys / Cells::kPerCell * groups * kRows);
    v_cells = take(keys * cells_v);
    dk = take(keys * lanes_d);
    dv = take(keys * lanes_v);
    k_not_finite = reinterpret_cast<uint8_t*>(take(keys / kBlockN / 4 + 1));
    begun = reinterpret_cast<uint8_t*>(take(keys / kBlockN / 4 + 1));
    for (Queries& queries : block) {
      queries.q_lanes = take(cells * kM);
      queries.do_lanes = take(cells_v * kM);
      queries.dq_lanes = take(groups * kRows * kM);
      queries.shift = take(kM);
      queries.shift_low = take(kM);
      queries.delta = take(kM);
    }
    q_rows = take(kBlocks * kPackedRows * lanes_d);
    do_rows = take(kBlocks * kPackedRows * lanes_v);
    scores = take(kBlockN * kM);
    dp = take(kBlockN * kM);
    p_rows = Cells::kPerCell == 2 ? take(kBlockN * kPackedRowCells) : scores;
    ds_rows = Cells::kPerCell == 2 ? take(kBlockN * kPackedRowCells) : dp;
    ds_pairs = Cells::kPerCell == 2 ? take(kBlockN * kM / 2) : dp;
    pairs.mask = options ? reinterpret_cast<int32_t*>(take(kBlockN * kM)) : nullptr;
    pairs.bias = options ? reinterpret_cast<int32_t*>(take(kBlockN * kM)) : nullptr;
    keep = options ? take(kBlockN * kM) : nullptr;
    slope = options ? take(kBlockN * kM) : nullptr;
  }

  Backward(const AttentionBwdParams& params, const Plan& pl, float* partial) : p(params), plan(pl), dq_partial(partial) {
    cells = round_up(p.headdim, Cells::kPerCell) / Cells::kPerCell;
    cells_v = round_up(p.headdim_v, Cells::kPerCell) / Cells::kPerCell;
    groups = round_up(p.headdim, kRows) / kRows;
    lanes_d = round_up(p.headdim, kM);
    lanes_v = round_up(p.headdim_v, kM);
    modified = is_modified(p);
    c = modified ? 1.0f : p.scale * kLog2e;
    int64_t floats = 0;
    layout([&](int64_t n) {
      floats += round_up(n, 16);
      return static_cast<float*>(nullptr);
    });
    float* at = static_cast<float*>(thread_scratch(floats * 4));
    layout([&](int64_t n) {
      float* mine = at;
      at += round_up(n, 16);
      return mine;
    });
  }

  struct Task {
    int64_t b, hk, chunk;  // the first of its batch entries and key heads
  };

  void run(const Task& task, const Task* next) {
    int64_t b_end = plan.batch_tasks == p.batch ? task.b + 1 : p.batch;
    int64_t h_end = plan.head_tasks == p.nheads_k ? task.hk + 1 : p.nheads_k;
    for (int64_t b = task.b; b < b_end; ++b)
      for (int64_t hk = task.hk; hk < h_end; ++hk) one_key_head(b, hk, task.chunk, next);
  }

  void one_key_head(int64_t b, int64_t hk, int64_t chunk, const Task* next) {
    int64_t group_size = p.nheads / p.nheads_k;
    Head s = head_of(p, b, hk * group_size);
    int64_t begin = chunk * plan.chunk_keys, keys = max64(0, min64(plan.chunk_keys, s.sk - begin));
    pack_keys(s, begin, keys);
    __builtin_memset(begun, 0, keys / kBlockN + 1);
    for (int64_t g = 0; g < group_size; ++g) {
      s = head_of(p, b, hk * group_size + g);
      for (int64_t m0 = 0; m0 < s.sq; m0 += kBlocks * kM) {
        look_ahead(s, m0 + kBlocks * kM, g + 1 < group_size, next, keys);
        query_blocks(s, m0, begin, keys, chunk);
      }
    }
    for (int64_t t = 0; t * kBlockN < keys; ++t)
      if (!begun[t]) clear_tile(t, keys);
    store_keys(s, begin, keys);
  }

  void clear_tile(int64_t t, int64_t keys) {
    int64_t first = t * kBlockN, rows = round_up(min64(kBlockN, keys - first), kRows);
    __builtin_memset(dk + first * lanes_d, 0, rows * lanes_d * sizeof(float));
    __builtin_memset(dv + first * lanes_v, 0, rows * lanes_v * sizeof(float));
  }

  void look_ahead(const Head& now, int64_t m, bool more_heads, const Task* next, int64_t keys) {
    for (auto& c : coming) c = Ahead{};
    Head s = now;
    if (m >= now.sq) {
      m = 0;
      if (more_heads) {
        s = head_of(p, now.b, now.h + 1);
      } else if (next != nullptr) {
        s = head_of(p, next->b, next->hk * (p.nheads / p.nheads_k));
        int64_t begin = next->chunk * plan.chunk_keys, count = min64(kBlockN, s.sk - begin);
        coming[3] = ahead(key_row<T>(p, s, p.k, p.k_stride, begin), p.k_stride[1], p.headdim, count);
        coming[4] = ahead(key_row<T>(p, s, p.v, p.v_stride, begin), p.v_stride[1], p.headdim_v, count);
      } else {
        return;
      }
    }
    int64_t rows = min64(kBlocks * kM, s.sq - m), row = s.q_start + m;
    coming[0] = ahead(q_row<T>(p, s, m), p.q_stride[1], p.headdim, rows);
    coming[1] = ahead(out_row<T>(const_cast<void*>(p.dout), p.do_stride, s.b, row, s.h), p.do_stride[1], p.headdim_v, rows);
    coming[2] = ahead(out_row<T>(p.o, p.o_stride, s.b, row, s.h), p.o_stride[1], p.headdim_v, rows);
    int64_t steps = (2 * kBlocks + 2) * max64(1, keys / kBlockN);
    step_rows = (max64(kBlocks * kM, coming[3].rows) + steps - 1) / steps;
  }
  void fetch() {
    for (auto& c : coming) c.fetch(step_rows);
  }

  void pack_keys(const Head& s, int64_t begin, int64_t keys) {
    for (int64_t t = 0; t * kBlockN < keys; ++t) {
      int64_t first = t * kBlockN, count = min64(kBlockN, keys - first), padded = round_up(count, kRows);
      int64_t group_ld = padded / Cells::kPerCell * kRows;
      float* groups_of_tile = k_groups + first / Cells::kPerCell * groups * kRows;
      vi bad = splat_i(0);
      for (int64_t n = 0; n < padded; ++n) {
        float *kc = k_cells + (first + n) * cells, *vc = v_cells + (first + n) * cells_v;
        if (n < count) {
          bad |= copy_row<Cells>(key_row<T>(p, s, p.k, p.k_stride, begin + first + n), p.headdim, kc);
          copy_row<Cells>(key_row<T>(p, s, p.v, p.v_stride, begin + first + n), p.headdim_v, vc);
        } else {
          __builtin_memset(kc, 0, cells * sizeof(float));
          __builtin_memset(vc, 0, cells_v * sizeof(float));
        }
      }
      for (int64_t n = 0; n < padded; n += Cells::kPerCell) {
        const T* a = n < count ? key_row<T>(p, s, p.k, p.k_stride, begin + first + n) : nullptr;
        const T* next = n + 1 < count ? key_row<T>(p, s, p.k, p.k_stride, begin + first + n + 1) : nullptr;
        int64_t k = n / Cells::kPerCell;
        if (a != nullptr)
          group_rows<Cells>(a, next, p.headdim, k, group_ld, groups_of_tile);
        else
          for (int64_t g = 0; g < groups; ++g) __builtin_memset(groups_of_tile + g * group_ld + k * kRows, 0, kRows * 4);
      }
      k_not_finite[t] = any(bad);
    }
  }

  void store_keys(const Head& s, int64_t begin, int64_t keys) {
    for (int64_t n = 0; n < keys; ++n) {
      store_row(dk + n * lanes_d, p.scale, p.headdim, out_row<T>(p.dk, p.dk_stride, s.b, s.k_start + begin + n, s.hk));
      store_row(dv + n * lanes_v, 1.0f, p.headdim_v, out_row<T>(p.dv, p.dv_stride, s.b, s.k_start + begin + n, s.hk));
    }
  }
  FASTATTN_INLINE void store_row(const float* from, float factor, int64_t cols, T* to) {
    int64_t d = 0;
    for (; d + VL <= cols; d += VL) store(to + d, load(from + d) * splat(factor));
    if (d < cols) store_n(to + d, load(from + d) * splat(factor), cols - d);
  }

  void query_blocks(const Head& s, int64_t m0, int64_t begin, int64_t keys, int64_t chunk) {
    int64_t first = begin + keys, last = begin;
    int count = 0;
    for (; count < kBlocks && m0 + count * kM < s.sq; ++count) {
      Lanes& lanes = block[count].lanes;
      make_lanes(p, s, m0 + count * kM, lanes);
      __builtin_memset(block[count].dq_lanes, 0, groups * kRows * kM * sizeof(float));
      if (max64(begin, lanes.begin) >= min64(begin + keys, lanes.end)) continue;
      first = min64(first, max64(begin, lanes.begin));
      last = max64(last, min64(begin + keys, lanes.end));
      pack_queries(s, count);
    }
    for (int64_t t = (first - begin) / kBlockN; begin + t * kBlockN < last; ++t) tile(s, count, begin, keys, t);
    for (int i = 0; i < count; ++i) store_queries(s, block[i], chunk);
  }

  void pack_queries(const Head& s, int index) {
    Queries& b = block[index];
    const Lanes& lanes = b.lanes;
    const T* q = q_row<T>(p, s, lanes.m0);
    const T* dout = out_row<T>(const_cast<void*>(p.dout), p.do_stride, s.b, s.q_start + lanes.m0, s.h);
    rows_to_lanes<Cells>(q, p.q_stride[1], lanes.rows, p.headdim, b.q_lanes);
    rows_to_lanes<Cells>(dout, p.do_stride[1], lanes.rows, p.headdim_v, b.do_lanes);
    for (int64_t i = 0; i < kM; ++i) {
      bool there = i < lanes.rows;
      float lse = there ? lse_of(p, s, lanes.m0 + i) : -kInfinity;
      // An empty row, or a lane without a query: exp2(score - inf) = 0 whatever the score.
      double exact = -1.4426950408889634 * lse;
      b.shift[i] = lse == -kInfinity ? -kInfinity : static_cast<float>(exact);
      // What the rounding of the shift leaves: without it every P of a row would be off by the same 1e-7.
      b.shift_low[i] = lse == -kInfinity ? 0.0f : static_cast<float>(exact - b.shift[i]);
      b.delta[i] = there ? delta_of<T>(p, s, lanes.m0 + i) : 0.0f;
    }
    pack_rows(b, q, p.q_stride[1], p.headdim, lanes_d, true, q_rows + index * kPackedRows * lanes_d);
    pack_rows(b, dout, p.do_stride[1], p.headdim_v, lanes_v, false, do_rows + index * kPackedRows * lanes_v);
  }
  // Rows as the B operand of the last two products: [kM / kPerCell][ld] cells, zeros past the rows and columns. A row that
  // sees nothing counts as zeros whatever it holds (its P and dS are 0). So does a q row that holds inf or NaN: where it
  // sees a key, its dS is NaN already.
  void pack_rows(const Queries& b, const T* from, int64_t stride, int64_t cols, int64_t ld, bool only_finite, float* to) {
    constexpr int64_t kPer = Cells::kPerCell;
    for (int64_t m = 0; m < kM; m += kPer, to += ld) {
      const T* row[2] = {nullptr, nullptr};
      for (int64_t i = 0; i < kPer && m + i < b.lanes.rows; ++i)
        if (b.shift[m + i] != -kInfinity && (!only_finite || is_finite(from + (m + i) * stride, cols)))
          row[i] = from + (m + i) * stride;
      for (int64_t d = 0; d < ld; d += VL) {
        vi x = splat_i(0);
        if (d < cols && row[0] != nullptr) x = column_cells<Cells>(row[0], row[1], d, cols);
        if (d < cols && row[0] == nullptr && row[1] != nullptr)
          x = column_cells<Cells>(row[1], static_cast<const T*>(nullptr), d, cols) << 16;
        store_i(to + d, x);
      }
    }
  }
  bool is_finite(const T* row, int64_t cols) {
    vi bad = splat_i(0);
    for (int64_t d = 0; d < cols; d += VL) bad |= not_finite(as_int(d + VL <= cols ? load(row + d) : load_n(row + d, cols - d)));
    return !any(bad);
  }

  void store_queries(const Head& s, const Queries& b, int64_t chunk) {
    const Lanes& lanes = b.lanes;
    float factor[kM];
    for (int i = 0; i < kM; ++i) factor[i] = p.scale;
    if (dq_partial != nullptr) {
      float* to = dq_partial + ((chunk * p.nheads + s.h) * query_rows(p) + query_row(p, s, lanes.m0)) * p.headdim;
      lanes_to_rows(b.dq_lanes, factor, lanes.rows, p.headdim, to, p.headdim);
    } else {
      T* to = out_row<T>(p.dq, p.dq_stride, s.b, s.q_start + lanes.m0, s.h);
      lanes_to_rows(b.dq_lanes, factor, lanes.rows, p.headdim, to, p.dq_stride[1]);
    }
  }

  // Rows of the chunk that a block of queries sees in a tile; none when count is 0.
  struct Seen {
    int64_t at, count;
  };

  void tile(const Head& s, int blocks, int64_t begin, int64_t keys, int64_t t) {
    Seen seen[kBlocks];
    for (int i = 0; i < blocks; ++i) seen[i] = tile_of_block(s, i, begin, keys, t);
    if (blocks > 1 && seen[0].at == seen[kBlocks - 1].at && seen[0].count == seen[kBlocks - 1].count)
      return add_to_keys(0, kBlocks, seen[0], keys, t);
    for (int i = 0; i < blocks; ++i) add_to_keys(i, 1, seen[i], keys, t);
  }

  Seen tile_of_block(const Head& s, int index, int64_t begin, int64_t keys, int64_t t) {
    Queries& b = block[index];
    const Lanes& lanes = b.lanes;
    int64_t tile_begin = t * kBlockN, tile_count = min64(kBlockN, keys - tile_begin);
    int64_t from = max64(begin + tile_begin, lanes.begin), to = min64(begin + tile_begin + tile_count, lanes.end);
    if (from >= to) return {0, 0};
    Sight sight = mask_sight(p, s, lanes.m0, lanes.rows, from, to - from);
    if (sight == Sight::none) return {0, 0};
    int64_t skip = (from - begin - tile_begin) / kRows * kRows;
    int64_t n0 = begin + tile_begin + skip, count = round_up(to - n0, kRows), at = tile_begin + skip;
    bool plain = !modified && sight == Sight::all && n0 >= lanes.full_begin && n0 + count <= lanes.full_end;

    fetch();
    product_rows<Cells>(k_cells + at * cells, cells, b.q_lanes, kM, count, cells, scores, kM, false);
    if (!plain) {
      vf top[kVecs];
      for (int v = 0; v < kVecs; ++v) top[v] = zero();
      apply_options(p, s, lanes, n0, count, sight, modified, scores, pairs, top, p.softcap > 0.0f ? slope : nullptr);
    }
    fetch();
    product_rows<Cells>(v_cells + at * cells_v, cells_v, b.do_lanes, kM, count, cells_v, dp, kM, false);
    if (p.dropout) apply_dropout(p, s, lanes.m0, n0, count, keep);
    if (Cells::kPerCell == 2 && p.dbias == nullptr && !(p.softcap > 0.0f)) {
      packed_gradients(b, count, index * kPackedRows);
    } else {
      gradients_of_scores(b, count);
      if (p.dbias != nullptr) add_bias_gradient(s, lanes, n0, min64(count, s.sk - n0));
      if (p.softcap > 0.0f)
        for (int64_t i = 0; i < count * kM; i += VL) store(dp + i, load(dp + i) * load(slope + i));
      if (Cells::kPerCell == 2) pack_scores(count, index * kPackedRows);
    }

    int64_t group_ld = round_up(tile_count, kRows) / Cells::kPerCell * kRows;
    const float* k_tile = k_groups + tile_begin / Cells::kPerCell * groups * kRows + skip / Cells::kPerCell * kRows;
    if (__builtin_expect(k_not_finite[t], 0))
      careful_product<Cells>(k_tile, group_ld, ds_pairs, groups, count / Cells::kPerCell, b.dq_lanes, true);
    else
      product_groups<Cells>(k_tile, group_ld, ds_pairs, kM, groups, count / Cells::kPerCell, b.dq_lanes, kM, true);
    return {at, count};
  }

  // dv += P^T do and dk += dS^T q (= instead of += the first time, when the whole tile is seen) over `blocks` blocks of queries
  // from `index` on.
  void add_to_keys(int index, int blocks, Seen seen, int64_t keys, int64_t t) {
    if (seen.count == 0) return;
    bool adds = begun[t] || seen.at != t * kBlockN || seen.count != round_up(min64(kBlockN, keys - seen.at), kRows);
    if (adds && !begun[t]) clear_tile(t, keys);
    begun[t] = 1;
    int64_t steps = blocks * kPackedRows, from = index * kPackedRows;
    fetch();
    for (int64_t d = 0; d < lanes_v; d += kM)
      product_rows<Cells>(p_rows + from, kPackedRowCells, do_rows + from * lanes_v + d, lanes_v, seen.count, steps,
                          dv + seen.at * lanes_v + d, lanes_v, adds);
    fetch();
    for (int64_t d = 0; d < lanes_d; d += kM)
      product_rows<Cells>(ds_rows + from, kPackedRowCells, q_rows + from * lanes_d + d, lanes_d, seen.count, steps,
                          dk + seen.at * lanes_d + d, lanes_d, adds);
  }

  // P (with dropout's factor) and dS = P (dP - delta) of the vector v of key n. An invisible pair is 0 whatever V holds.
  struct Gradient {
    vf p, ds;
  };
  inline __attribute__((always_inline)) Gradient gradient(const Queries& b, int64_t n, int v) {
    int64_t i = n * kM + v * VL;
    vf prob = exp2<kDegree>(fma(load(scores + i), splat(c), load(b.shift + v * VL)) + load(b.shift_low + v * VL));
    vf g = load(dp + i), kept = prob;
    if (p.dropout) {
      vf factor = load(keep + i);
      kept = select((vi)(factor == zero()), zero(), prob * factor);
      g = select((vi)(factor == zero()), zero(), g * factor);
    }
    return {kept, select((vi)(prob == zero()), zero(), prob * (g - load(b.delta + v * VL)))};
  }

  // scores becomes P and dp becomes dS.
  void gradients_of_scores(const Queries& b, int64_t count) {
    for (int64_t n = 0; n < count; ++n)
      for (int v = 0; v < kVecs; ++v) {
        Gradient x = gradient(b, n, v);
        store(scores + n * kM + v * VL, x.p);
        store(dp + n * kM + v * VL, x.ds);
      }
  }

  // bf16: P and dS by rows (pairs along queries, at cell `to` of a row) and dS by pairs of keys.
  inline __attribute__((always_inline)) void pack_two_keys(int64_t n, int64_t to, const vf (&probs)[2][kVecs],
                                                           const vf (&ds)[2][kVecs]) {
#if defined(__AVX512BF16__)
    auto row = [](const vf(&x)[kVecs]) { return (vi)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]); };
    for (int i = 0; i < 2; ++i) {
      store_i(p_rows + (n + i) * kPackedRowCells + to, row(probs[i]));
      store_i(ds_rows + (n + i) * kPackedRowCells + to, row(ds[i]));
    }
    for (int v = 0; v < kVecs; ++v) store_i(ds_pairs + n / 2 * kM + v * VL, pack_pairs(ds[0][v], ds[1][v]));
#endif
  }
  void packed_gradients(const Queries& b, int64_t count, int64_t to) {
    for (int64_t n = 0; n < count; n += 2) {
      vf probs[2][kVecs], ds[2][kVecs];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          Gradient x = gradient(b, n + i, v);
          probs[i][v] = x.p;
          ds[i][v] = x.ds;
        }
      pack_two_keys(n, to, probs, ds);
    }
  }
  void pack_scores(int64_t count, int64_t to) {
    for (int64_t n = 0; n < count; n += 2) {
      vf probs[2][kVecs], ds[2][kVecs];
      for (int i = 0; i < 2; ++i)
        for (int v = 0; v < kVecs; ++v) {
          probs[i][v] = load(scores + (n + i) * kM + v * VL);
          ds[i][v] = load(dp + (n + i) * kM + v * VL);
        }
      pack_two_keys(n, to, probs, ds);
    }
  }

  void add_bias_gradient(const Head& s, const Lanes& lanes, int64_t n0, int64_t count) {
    const int64_t* st = p.dbias_stride;
    float* to = p.dbias + s.b * st[0] + s.h * st[1] + lanes.m0 * st[2] + n0 * st[3];
    for (int64_t n = 0; n < count; ++n) {
      const float* ds = dp + n * kM;
      if (st[2] == 0) {
        vf sum = zero();  // lanes without a query hold 0
        for (int v = 0; v < kVecs; ++v) sum = sum + load(ds + v * VL);
        to[n * st[3]] += reduce_add(sum);
      } else {
        for (int64_t lane = 0; lane < lanes.rows; ++lane) to[lane * st[2] + n * st[3]] += ds[lane];
      }
    }
  }
};

// dq = sum of the chunks' partial sums, in their order.
template <class T>
void reduce_queries(const AttentionBwdParams& p, const Plan& plan, const float* partial) {
  int64_t rows = query_rows(p), stride = p.nheads * rows * p.headdim;
  parallel_for(p.nthreads, p.batch * p.nheads, [&](int64_t task) {
    Head s = head_of(p, task / p.nheads, task % p.nheads);
    for (int64_t m = 0; m < s.sq; ++m) {
      const float* from = partial + (s.h * rows + query_row(p, s, m)) * p.headdim;
      T* to = out_row<T>(p.dq, p.dq_stride, s.b, s.q_start + m, s.h);
      for (int64_t d = 0; d < p.headdim; d += VL) {
        int64_t n = min64(VL, p.headdim - d);
        vf sum = load_n(from + d, n);
        for (int64_t i = 1; i < plan.chunks; ++i) sum = sum + load_n(from + i * stride + d, n);
        store_n(to + d, sum, n);
      }
    }
  });
}

// dsinks[h] = -sum over rows of exp(sink - lse) * delta: the sink is a key whose value is 0.
template <class T>
void sink_gradients(const AttentionBwdParams& p) {
  parallel_for(p.nthreads, p.nheads, [&](int64_t h) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      Head s = head_of(p, b, h);
      for (int64_t m = 0; m < s.sq; ++m) {
        float lse = lse_of(p, s, m);
        if (lse == -kInfinity) continue;
        sum -= static_cast<double>(__builtin_expf(p.sinks[h] - lse)) * delta_of<T>(p, s, m);
      }
    }
    p.dsinks[h] = static_cast<float>(sum);
  });
}

template <class T, class Cells>
void backward(const AttentionBwdParams& p) {
  Plan plan = make_plan(p);
  float* partial = nullptr;
  if (plan.chunks > 1) partial = new float[plan.chunks * p.nheads * query_rows(p) * p.headdim];
  int64_t heads = plan.batch_tasks * plan.head_tasks;
  using Task = typename Backward<T, Cells>::Task;
  auto task_of = [&](int64_t i) { return Task{i % heads / plan.head_tasks, i % heads % plan.head_tasks, i / heads}; };
  parallel_for_ahead(p.nthreads, heads * plan.chunks, [&](int64_t i, int64_t then) {
    Task next = task_of(then);
    Backward<T, Cells>(p, plan, partial).run(task_of(i), then < heads * plan.chunks ? &next : nullptr);
  });
  if (partial != nullptr) reduce_queries<T>(p, plan, partial);
  delete[] partial;
  if (p.dsinks != nullptr) sink_gradients<T>(p);
}

}  // namespace

void attention_bwd(const AttentionBwdParams& p) {
  if (p.batch <= 0) return;
  if (p.dtype == 0) return backward<float, FloatCells>(p);
  if (p.dtype == 2) return backward<f16, FloatCells>(p);
#if defined(__AVX512BF16__)
  return backward<bf16, PairCells>(p);
#else
  return backward<bf16, FloatCells>(p);
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
