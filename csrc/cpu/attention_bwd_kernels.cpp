// attention_bwd: dq, dk, dv (and dbias, dsinks) from do, o and lse; P is recomputed tile by tile.
// One task per (batch, key head, chunk of keys): every query head of the group and every block of queries passes over the
// chunk's K and V, dk and dv accumulate in fp32 in the task's scratch, dq in registers and L1. Five products per tile,
// S = K q^T, dP = V do^T, dq += K^T dS, dv += P do, dk += dS q, all through gemm.h with lanes over queries (first three) or head
// columns (last two). Two blocks of kM queries go through a tile together: they share K, V and the last two products, which pay
// for reading and writing dv and dk. In cells of bf16 pairs the exponentials run beside dP's product. The partition depends on
// shapes only, so results do not depend on the thread count. Scratch: 5 * chunk * headdim floats. Bound: multiply-adds, 10 *
// headdim FLOPs per visible pair. Dao, FlashAttention-2, arXiv:2307.08691, Algorithm 2.
#include "attention_bwd_keys.h"
#include "kernels.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class T, class Cells>
struct Backward {
  // Blocks of queries that go through a tile together and share the products over queries.
  static constexpr int kBlocks = 2;
  static constexpr int64_t kPackedRows = kM / Cells::kPerCell, kPackedRowCells = kBlocks * kPackedRows;
  static constexpr int kDegree = sizeof(T) == 2 && !is_f16<T> ? 3 : 6;
  // Exponentials beside products: 16 registers hold a product alone, and floats gain nothing by it.
  static constexpr bool kBeside = VB == 64 && Cells::kPerCell == 2;
  static constexpr bool kScaledQueries = Cells::kPerCell == 1;  // as in the forward: the same scores, bit for bit

  const AttentionBwdParams& p;
  const Plan& plan;
  float* dq_partial;  // [chunks][nheads][rows of dq][headdim], null with one chunk
  int64_t cells, cells_v, groups, lanes_d, lanes_v;
  float c;
  bool modified;
  bool around;  // gradients are written around the cache
  ChunkKeys<T, Cells> chunk_keys;
  float *dk, *dv;  // of the chunk
  uint8_t* begun;  // per tile: dk and dv hold sums, else nothing yet
  // Blocks of kM queries.
  struct Queries {
    Lanes lanes;
    float *q_lanes, *do_lanes, *dq_lanes, *shift, *shift_low, *delta;
    float *scores, *dp;  // of one register block of keys
    bool started;        // dq_lanes holds a sum
  } block[kBlocks];
  float *q_rows, *do_rows;  // of all blocks, one after the other
  // One tile. P and dS by rows have the blocks side by side, [keys][kBlocks][kPackedRows]; dS by pairs of keys has a block of
  // its own per block of queries.
  float *scores, *dp, *p_rows, *ds_rows, *ds_pairs, *keep, *slope;
  PairTiles pairs;
  // The rows of the next block of queries, or of the next task with its keys, on their way into L2, a few per register block.
  static constexpr int kStreams = 5;
  Ahead coming[kStreams];
  int stream = 0;
  int64_t step_rows = 0;

  template <class Take>
  void layout(Take&& take) {
    int64_t keys = plan.chunk_keys;
    bool options = p.mask != nullptr || p.dropout || modified;
    chunk_keys.layout(take, keys);
    dk = take(keys * lanes_d);
    dv = take(keys * lanes_v);
    begun = reinterpret_cast<uint8_t*>(take(keys / kBlockN / 4 + 1));
    for (Queries& queries : block) {
      queries.q_lanes = take(cells * kM);
      queries.do_lanes = take(cells_v * kM);
      queries.dq_lanes = take(groups * kRows * kM);
      queries.shift = take(kM);
      queries.shift_low = take(kM);
      queries.delta = take(kM);
      queries.scores = take(kRows * kM);
      queries.dp = take(kRows * kM);
    }
    q_rows = take(kBlocks * kPackedRows * lanes_d);
    do_rows = take(kBlocks * kPackedRows * lanes_v);
    scores = options ? take(kBlockN * kM) : nullptr;
    dp = take(kBlockN * kM);
    p_rows = take(kBlockN * kPackedRowCells);
    ds_rows = take(kBlockN * kPackedRowCells);
    ds_pairs = Cells::kPerCell == 2 ? take(kBlocks * kBlockN * kM / 2) : ds_rows;
    pairs.mask = options ? reinterpret_cast<int32_t*>(take(kBlockN * kM)) : nullptr;
    pairs.bias = options ? reinterpret_cast<int32_t*>(take(kBlockN * kM)) : nullptr;
    keep = options ? take(kBlockN * kM) : nullptr;
    slope = options ? take(kBlockN * kM) : nullptr;
  }

  Backward(const AttentionBwdParams& params, const Plan& pl, float* partial)
      : p(params), plan(pl), dq_partial(partial), chunk_keys(params) {
    cells = round_up(p.headdim, Cells::kPerCell) / Cells::kPerCell;
    cells_v = round_up(p.headdim_v, Cells::kPerCell) / Cells::kPerCell;
    groups = round_up(p.headdim, kRows) / kRows;
    lanes_d = round_up(p.headdim, kM);
    lanes_v = round_up(p.headdim_v, kM);
    modified = is_modified(p);
    c = modified || kScaledQueries ? 1.0f : p.scale * kLog2e;
    around = writes_around<T>(p, query_rows(p));
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
    chunk_keys.pack(s, begin, keys);
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
    if (around) stream_fence();
  }

  void clear_tile(int64_t t, int64_t keys) {
    int64_t first = t * kBlockN, rows = round_up(min64(kBlockN, keys - first), kRows);
    __builtin_memset(dk + first * lanes_d, 0, rows * lanes_d * sizeof(float));
    __builtin_memset(dv + first * lanes_v, 0, rows * lanes_v * sizeof(float));
  }

  void look_ahead(const Head& now, int64_t m, bool more_heads, const Task* next, int64_t keys) {
    for (auto& c : coming) c = Ahead{};
    stream = 0;
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
    int64_t rows = min64(kBlocks * kM, s.sq - m), steps = 2 * kBlocks * max64(1, keys / kRows), total = 0;
    coming[0] = ahead(q_row<T>(p, s, m), p.q_stride[1], p.headdim, rows);
    coming[1] = ahead(do_row<T>(p, s, m), p.do_stride[1], p.headdim_v, rows);
    coming[2] = ahead(o_row<T>(p, s, m), p.o_stride[1], p.headdim_v, rows);
    for (auto& c : coming) total += c.rows;
    step_rows = (total + steps - 1) / steps;
  }
  // Only while S and dP are computed: the other products stream through L1 and need its misses for themselves.
  void fetch(int64_t steps = 1) {
    for (int64_t left = steps * step_rows; stream < kStreams && left > 0;) {
      Ahead& c = coming[stream];
      int64_t before = c.done;
      c.fetch(left);
      left -= c.done - before;
      if (c.done >= c.rows) ++stream;
    }
  }

  void store_keys(const Head& s, int64_t begin, int64_t keys) {
    for (int64_t n = 0; n < keys; ++n) {
      T* dk_row = out_row<T>(p.dk, p.dk_stride, s.b, s.k_start + begin + n, s.hk);
      T* dv_row = out_row<T>(p.dv, p.dv_stride, s.b, s.k_start + begin + n, s.hk);
      store_row(dk + n * lanes_d, p.scale, p.headdim, dk_row, around);
      store_row(dv + n * lanes_v, 1.0f, p.headdim_v, dv_row, around);
    }
  }

  void query_blocks(const Head& s, int64_t m0, int64_t begin, int64_t keys, int64_t chunk) {
    int64_t first = begin + keys, last = begin;
    int count = 0;
    for (; count < kBlocks && m0 + count * kM < s.sq; ++count) {
      Lanes& lanes = block[count].lanes;
      make_lanes(p, s, m0 + count * kM, lanes);
      block[count].started = false;
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
    const T *q = q_row<T>(p, s, lanes.m0), *dout = do_row<T>(p, s, lanes.m0);
    rows_to_lanes<Cells>(q, p.q_stride[1], lanes.rows, p.headdim, b.q_lanes);
    if (kScaledQueries && !modified) scale_lanes(b.q_lanes, p.scale * kLog2e, cells);
    rows_to_lanes<Cells>(dout, p.do_stride[1], lanes.rows, p.headdim_v, b.do_lanes);
    shifts(lse_of(p, s, lanes.m0), lanes.rows, b.shift, b.shift_low);
    deltas<Cells, T>(p, s, lanes.m0, lanes.rows, b.do_lanes, b.delta);
    // Where a q row that holds inf or NaN sees a key, its dS is NaN already: dk may count it as zeros.
    rows_as_steps<Cells>(q, p.q_stride[1], lanes.rows, p.headdim, b.shift, true, lanes_d, q_rows + index * kPackedRows * lanes_d);
    rows_as_steps<Cells>(dout, p.do_stride[1], lanes.rows, p.headdim_v, b.shift, false, lanes_v,
                         do_rows + index * kPackedRows * lanes_v);
  }

  void store_queries(const Head& s, const Queries& b, int64_t chunk) {
    const Lanes& lanes = b.lanes;
    if (!b.started) __builtin_memset(b.dq_lanes, 0, groups * kRows * kM * sizeof(float));
    float factor[kM];
    for (float& f : factor) f = p.scale;
    if (dq_partial != nullptr) {
      float* to = dq_partial + ((chunk * p.nheads + s.h) * query_rows(p) + query_row(p, s, lanes.m0)) * p.headdim;
      lanes_to_rows(b.dq_lanes, factor, lanes.rows, p.headdim, to, p.headdim);
    } else {
      T* to = out_row<T>(p.dq, p.dq_stride, s.b, s.q_start + lanes.m0, s.h);
      lanes_to_rows(b.dq_lanes, factor, lanes.rows, p.headdim, to, p.dq_stride[1], around);
    }
  }

  // What a block of queries sees of a tile: `count` rows from row `at` of the tile on, none when count is 0.
  struct Seen {
    int64_t at = 0, count = 0;
    Sight sight = Sight::none;
    __attribute__((always_inline)) bool row(int64_t n) const { return n >= at && n < at + count; }
  };

  void tile(const Head& s, int blocks, int64_t begin, int64_t keys, int64_t t) {
    int64_t tile_begin = t * kBlockN, tile_count = min64(kBlockN, keys - tile_begin), n0 = begin + tile_begin;
    Seen seen[kBlocks];
    for (int i = 0; i < blocks; ++i) seen[i] = seen_by(s, block[i].lanes, n0, tile_count);
    bool simple = !modified && !p.dropout;
    for (int i = 0; i < blocks; ++i) simple = simple && seen[i].sight != Sight::some;
    if (simple)
      simple_gradients(seen, blocks, n0, tile_begin);
    else
      for (int i = 0; i < blocks; ++i) gradients_with_options(s, i, seen[i], n0, tile_begin);
    for (int i = 0; i < blocks; ++i) add_to_queries(i, seen[i], tile_begin, tile_count);
    add_to_keys(seen, blocks, tile_begin, tile_count, t);
  }

  Seen seen_by(const Head& s, const Lanes& lanes, int64_t n0, int64_t tile_count) {
    Seen seen;
    int64_t from = max64(n0, lanes.begin), to = min64(n0 + tile_count, lanes.end);
    if (from >= to) return seen;
    seen.sight = mask_sight(p, s, lanes.m0, lanes.rows, from, to - from);
    if (seen.sight == Sight::none) return seen;
    seen.at = (from - n0) / kRows * kRows;
    seen.count = round_up(to - n0 - seen.at, kRows);
    return seen;
  }

  // P and dS of a tile without options: a register block of keys at a time, S of every block of queries, then dP with the
  // exponentials beside it, then dS while dP is in registers.
  void simple_gradients(const Seen (&seen)[kBlocks], int blocks, int64_t n0, int64_t tile_begin) {
    Band band[kBlocks];
    int64_t full_begin[kBlocks], full_end[kBlocks], first = kBlockN, last = 0;
    for (int i = 0; i < blocks; ++i) {
      if (seen[i].count == 0) continue;
      const Lanes& lanes = block[i].lanes;
      full_begin[i] = lanes.full_begin - n0;
      full_end[i] = lanes.full_end - n0;
      first = min64(first, seen[i].at);
      last = max64(last, seen[i].at + seen[i].count);
      band[i] = Band::of(lanes, n0, 0, kBlockN);
    }
    for (int64_t n = first; n < last; n += kRows) {
      for (int i = 0; i < blocks; ++i) {
        if (!seen[i].row(n)) continue;
        fetch();
        bool banded = n < full_begin[i] || n + kRows > full_end[i];
        scores_of_keys(block[i], chunk_keys.k(tile_begin + n), n, banded ? &band[i] : nullptr);
      }
      for (int i = 0; i < blocks; ++i) {
        if (!seen[i].row(n)) continue;
        fetch();
        if (n < full_begin[i] || n + kRows > full_end[i] || block[i].lanes.rows < kM)
          gradients_of_keys<true>(i, chunk_keys.v(tile_begin + n), n);
        else
          gradients_of_keys<false>(i, chunk_keys.v(tile_begin + n), n);
      }
    }
  }

  void scores_of_keys(Queries& b, const float* k, int64_t n, const Band* band) {
    int64_t before = (cells - 1) / kChain * kChain;  // cells that earlier, shorter chains have summed
    float* to = b.scores;
    if (before > 0) product_rows<Cells>(k, cells, b.q_lanes, kM, kRows, before, to, kM, false);
    auto whole = [&](int i, int v, vf x) { return before > 0 ? x + load(to + i * kM + v * VL) : x; };
    const float *a = k + before, *q = b.q_lanes + before * kM;
    if (band == nullptr)
      block_product<Cells>(a, cells, 1, q, kM, cells - before,
                           [&](int i, int v, vf x) { store(to + i * kM + v * VL, whole(i, v, x)); });
    else
      block_product<Cells>(a, cells, 1, q, kM, cells - before,
                           [&](int i, int v, vf x) { store(to + i * kM + v * VL, band->cut(v, n + i, whole(i, v, x))); });
  }

  // Scores of a register block of keys to P, in place and by rows, a key per step.
  struct Probabilities {
    const Exp2<kDegree> exp2 = Exp2<kDegree>::make();
    float *scores, *rows;
    const float *shift, *shift_low;
    int64_t left = kRows, every = 1;
    vf scale, held;  // held: the first lanes of the key at hand

    Probabilities(const Queries& b, float c, float* rows)
        : scores(b.scores), rows(rows), shift(b.shift), shift_low(b.shift_low), scale(splat(c)) {}

    template <int v>
    inline __attribute__((always_inline)) vf probability() {
      vf x = load(scores + v * VL);
      x = kScaledQueries ? x + load(shift + v * VL) : fma(x, scale, load(shift + v * VL));
      if constexpr (kDegree != 3) x = x + load(shift_low + v * VL);
      x = exp2(x);
      store(scores + v * VL, x);
      return x;
    }
    inline __attribute__((always_inline)) void next_key() {
      --left;
      scores += kM;
      rows += kPackedRowCells;
    }
    inline __attribute__((always_inline)) void step(Vector<0>) {
      if (left > 0) held = probability<0>();
    }
    inline __attribute__((always_inline)) void step(Vector<1>) {
      if (left == 0) return;
      vf x[kVecs] = {held, probability<1>()};
      store_cells(rows, x);
      next_key();
    }
    __attribute__((always_inline)) void finish() {
      while (left > 0) {
        vf x[kVecs] = {probability<0>(), probability<1>()};
        if constexpr (kVecs > 2) x[kVecs - 1] = probability<kVecs - 1>();
        store_cells(rows, x);
        next_key();
      }
    }
  };

  // kM values of a key as cells along queries.
  FASTATTN_INLINE void store_cells(float* to, const vf (&x)[kVecs]) {
#if defined(__AVX512BF16__)
    if constexpr (Cells::kPerCell == 2) return store_i(to, (vi)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
#endif
    for (int v = 0; v < kVecs; ++v) store(to + v * VL, x[v]);
  }

  // kHides: some pairs are not seen, and an invisible pair is 0 whatever V holds.
  template <bool kHides>
  void gradients_of_keys(int index, const float* v_rows, int64_t n) {
    Queries& b = block[index];
    int64_t before = (cells_v - 1) / kChain * kChain, to = n * kPackedRowCells + index * kPackedRows;
    if (before > 0) product_rows<Cells>(v_rows, cells_v, b.do_lanes, kM, kRows, before, b.dp, kM, false);
    Probabilities probabilities(b, c, p_rows + to);
    vf dp_reg[kRows][kVecs];
    auto keep_vector = [&](int i, int v, vf x) { dp_reg[i][v] = before > 0 ? x + load(b.dp + i * kM + v * VL) : x; };
    const float *a = v_rows + before, *dout = b.do_lanes + before * kM;
    if constexpr (kBeside) {
      probabilities.every = max64(1, (cells_v - before) / (kVecs * kRows));
      block_product<Cells>(a, cells_v, 1, dout, kM, cells_v - before, keep_vector, probabilities);
      probabilities.finish();
    } else {
      probabilities.finish();
      block_product<Cells>(a, cells_v, 1, dout, kM, cells_v - before, keep_vector);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i += 2) {
      vf ds[2][kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          vf prob = load(b.scores + (i + j) * kM + v * VL);
          ds[j][v] = prob * (dp_reg[i + j][v] - load(b.delta + v * VL));
          if constexpr (kHides) ds[j][v] = select((vi)(prob == zero()), zero(), ds[j][v]);
        }
      store_score_gradients(index, n + i, ds);
    }
  }

  void gradients_with_options(const Head& s, int index, const Seen& seen, int64_t tile_n0, int64_t tile_begin) {
    if (seen.count == 0) return;
    Queries& b = block[index];
    const Lanes& lanes = b.lanes;
    int64_t n0 = tile_n0 + seen.at, count = seen.count, at = tile_begin + seen.at;
    fetch(count / kRows);
    product_rows<Cells>(chunk_keys.k(at), cells, b.q_lanes, kM, count, cells, scores, kM, false);
    vf top[kVecs];
    for (int v = 0; v < kVecs; ++v) top[v] = zero();
    apply_options(p, s, lanes, n0, count, seen.sight, modified, scores, pairs, top, p.softcap > 0.0f ? slope : nullptr);
    fetch(count / kRows);
    product_rows<Cells>(chunk_keys.v(at), cells_v, b.do_lanes, kM, count, cells_v, dp, kM, false);
    if (p.dropout) apply_dropout(p, s, lanes.m0, n0, count, keep);
    bool changes = p.dbias != nullptr || p.softcap > 0.0f;  // dS is not done yet
    for (int64_t n = 0; n < count; n += 2) {
      vf probs[2][kVecs], ds[2][kVecs];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          Gradient x = gradient(b, n + i, v);
          probs[i][v] = x.p;
          ds[i][v] = x.ds;
          if (changes) store(dp + (n + i) * kM + v * VL, x.ds);
        }
      for (int i = 0; i < 2; ++i) store_cells(p_rows + (seen.at + n + i) * kPackedRowCells + index * kPackedRows, probs[i]);
      if (!changes) store_score_gradients(index, seen.at + n, ds);
    }
    if (!changes) return;
    if (p.dbias != nullptr) add_bias_gradient(s, lanes, n0, min64(count, s.sk - n0));
    for (int64_t n = 0; n < count; n += 2) {
      vf ds[2][kVecs];
      for (int i = 0; i < 2; ++i)
        for (int v = 0; v < kVecs; ++v) {
          int64_t cell = (n + i) * kM + v * VL;
          ds[i][v] = load(dp + cell);
          if (p.softcap > 0.0f) ds[i][v] = ds[i][v] * load(slope + cell);
        }
      store_score_gradients(index, seen.at + n, ds);
    }
  }

  // dS of keys n and n + 1 of the tile, by rows and, in cells of pairs, by pairs of keys.
  inline __attribute__((always_inline)) void store_score_gradients(int index, int64_t n, const vf (&ds)[2][kVecs]) {
    for (int i = 0; i < 2; ++i) store_cells(ds_rows + (n + i) * kPackedRowCells + index * kPackedRows, ds[i]);
    if constexpr (Cells::kPerCell == 2) {
      float* to = ds_pairs + index * (kBlockN * kM / 2) + n / 2 * kM;
      for (int v = 0; v < kVecs; ++v) store_i(to + v * VL, pack_pairs(ds[0][v], ds[1][v]));
    }
  }

  // dq^T += K^T dS of a block of queries.
  void add_to_queries(int index, const Seen& seen, int64_t tile_begin, int64_t tile_count) {
    if (seen.count == 0) return;
    Queries& b = block[index];
    constexpr int64_t kPer = Cells::kPerCell, ld = kPer == 2 ? kM : kPackedRowCells;
    int64_t steps = seen.count / kPer;
    const float* ds = ds_pairs + (kPer == 2 ? index * (kBlockN * kM / 2) : index * kM) + seen.at / kPer * ld;
    Columns columns = chunk_keys.columns(tile_begin, tile_count, seen.at);
    if (__builtin_expect(chunk_keys.k_not_finite[tile_begin / kBlockN], 0)) {
      for (int64_t i = 0; i < steps; ++i) __builtin_memcpy(dp + i * kM, ds + i * ld, kM * sizeof(float));
      careful_product<Cells>(columns, dp, groups, steps, b.dq_lanes, b.started);
    } else {
      product_groups<Cells>(columns, ds, ld, groups, steps, b.dq_lanes, kM, b.started);
    }
    b.started = true;
  }

  // dv += P^T do and dk += dS^T q (= instead of += the first time, when the whole tile is seen).
  void add_to_keys(const Seen (&seen)[kBlocks], int blocks, int64_t tile_begin, int64_t tile_count, int64_t t) {
    auto who = [&](int64_t n) {
      int sees = 0;
      for (int i = 0; i < blocks; ++i) sees |= seen[i].row(n) << i;
      return sees;
    };
    int64_t padded = round_up(tile_count, kRows), rows = 0;
    for (int64_t n = 0; n < padded; n += kRows) rows += who(n) != 0 ? kRows : 0;
    if (rows == 0) return;
    bool adds = begun[t] || rows < padded;
    if (adds && !begun[t]) clear_tile(t, tile_begin + tile_count);
    begun[t] = 1;
    for (int64_t n = 0, end; n < padded; n = end) {
      int sees = who(n);
      for (end = n + kRows; end < padded && who(end) == sees;) end += kRows;
      if (sees == 0) continue;
      int64_t from = sees == 2 ? kPackedRows : 0, steps = sees == 3 ? 2 * kPackedRows : kPackedRows;
      int64_t row = n * kPackedRowCells + from, to = tile_begin + n;
      add_rows(p_rows + row, do_rows + from * lanes_v, lanes_v, end - n, steps, dv + to * lanes_v, adds);
      add_rows(ds_rows + row, q_rows + from * lanes_d, lanes_d, end - n, steps, dk + to * lanes_d, adds);
    }
  }

  // c[rows][ld] (+)= a b over `steps` packed rows of queries.
  void add_rows(const float* a, const float* b, int64_t ld, int64_t rows, int64_t steps, float* c, bool adds) {
    for (int64_t d = 0; d < ld; d += kM)
      for (int64_t n = 0; n < rows; n += kRows) {
        float* to = c + n * ld + d;
        if (adds)
          block_product<Cells>(a + n * kPackedRowCells, kPackedRowCells, 1, b + d, ld, steps,
                               [&](int i, int v, vf x) { store(to + i * ld + v * VL, load(to + i * ld + v * VL) + x); });
        else
          block_product<Cells>(a + n * kPackedRowCells, kPackedRowCells, 1, b + d, ld, steps,
                               [&](int i, int v, vf x) { store(to + i * ld + v * VL, x); });
      }
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
