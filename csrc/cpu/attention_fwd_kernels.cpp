// attention_fwd: o = softmax(scale q k^T + options) v and lse, one task per (batch, head, block of queries).
// S^T formulation: lanes are queries, so q is packed once per task, k and v are broadcast in their own row order, the
// softmax statistics are per lane without horizontal steps, and o is transposed back once. With AVX-512 the exponentials of
// one tile run beside the product of the tile before it: they mostly use pipes that the product leaves idle.
// Scratch per thread: q^T, o^T of the block, one K and one V tile, one score tile: L2 resident (0.4 MB at headdim 128).
// Bound: multiply-adds, 4 * headdim FLOPs per visible pair. Dao, FlashAttention-2, arXiv:2307.08691.
#include "attention_scores.h"
#include "attention_tiles.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kMaxMicros = 8;     // BLOCK_M = up to kMaxMicros * kM queries per task
constexpr int64_t kManyTasks = 64;    // of the longest: they keep the threads of most machines busy
constexpr float kLazyRescale = 8.0f;  // rescale o only when the maximum grew by more than 2^8: P stays far from overflow

template <class T, class Cells>
struct Forward {
  static constexpr int kDegree = sizeof(T) == 2 && !is_f16<T> ? 3 : 6;
  static constexpr bool kBeside = VB == 64;                     // exponentials beside products: 16 registers hold a product alone
  static constexpr bool kScaledQueries = Cells::kPerCell == 1;  // floats take the scale when they are packed

  const AttentionParams& p;
  int64_t cells, groups, micros, block_n;
  bool around_cache;  // store o so
  float c;            // score of the product to log2 units
  bool modified;
  // scratch
  float *qt, *ot, *scores, *tiles_of_probs[2], *k_tile, *v_tile, *keep;
  PairTiles pairs;
  Ahead k_ahead, v_ahead, q_ahead, o_ahead, bias_ahead;
  KeySpan seen;           // what the mask leaves of the tile at hand
  int64_t step_rows = 0;  // rows to fetch per register block of the first product

  // BLOCK_N. Pairs of bf16 leave room in the cache for longer tiles, which share what a tile costs; their sums round less than P.
  static int64_t keys_per_tile(const AttentionParams& p) {
    return Cells::kPerCell == 2 && p.headdim <= 64 && p.headdim_v <= 64 ? 256 : 128;
  }

  static int64_t scratch_floats(const AttentionParams& p, int64_t micros) {
    int64_t cells = round_up(p.headdim, Cells::kPerCell) / Cells::kPerCell, cols = round_up(p.headdim_v, kRows);
    bool options = p.mask != nullptr || p.bias != nullptr || p.dropout;
    return micros * kM * (cells + cols) + keys_per_tile(p) * (kM * (options ? 6 : 3) + cells + cols) + 1024;
  }

  Forward(const AttentionParams& params, int64_t micros_, bool around_cache_)
      : p(params), micros(micros_), around_cache(around_cache_) {
    cells = round_up(p.headdim, Cells::kPerCell) / Cells::kPerCell;
    groups = round_up(p.headdim_v, kRows) / kRows;
    block_n = keys_per_tile(p);
    modified = is_modified(p);
    c = kScaledQueries ? 1.0f : modified ? kLog2e : p.scale * kLog2e;
    float* at = static_cast<float*>(thread_scratch(scratch_floats(p, micros) * 4));
    auto take = [&](int64_t n) {
      float* mine = at;
      at += round_up(n, 16);
      return mine;
    };
    qt = take(micros * kM * cells);
    ot = take(micros * kM * groups * kRows);
    scores = take(block_n * kM);
    for (float*& probs : tiles_of_probs) probs = kBeside ? take(block_n * kM / Cells::kPerCell) : scores;
    k_tile = take(block_n * cells);
    v_tile = take(block_n * groups * kRows);
    bool options = p.mask != nullptr || p.bias != nullptr || p.dropout;
    pairs.mask = options ? reinterpret_cast<int32_t*>(take(block_n * kM)) : nullptr;
    pairs.bias = options ? reinterpret_cast<int32_t*>(take(block_n * kM)) : nullptr;
    keep = options ? take(block_n * kM) : nullptr;
  }

  struct Row {  // running statistics of one block of kM queries
    Lanes lanes;
    vf m[kVecs], l[kVecs];
    bool started;
    void add(const vf (&sum)[2][kVecs]) {
      for (int v = 0; v < kVecs; ++v) l[v] = l[v] + (sum[0][v] + sum[1][v]);
    }
  };

  // A tile of scores to probabilities, two keys a step, beside the product of another tile.
  template <bool kDropout>
  struct Exponentials {
    const Exp2<kDegree> exp2 = Exp2<kDegree>::make();
    const float* scores;
    float* probs;
    const float* keep;
    const Ends ends;  // keys of each vector of lanes
    int64_t left, every = 1;
    vf scale, shift[kVecs];
    vf sum[2][kVecs];  // of this tile, even and odd keys apart: short chains, small rounding

    Exponentials(const Row& r, float c, const float* scores, float* probs, const float* keep, const Ends& ends)
        : scores(scores), probs(probs), keep(keep), ends(ends), left(ends.of[0]), scale(splat(c)) {
      // A lane that has seen nothing has m = -inf: subtracting 0 instead leaves exp2(-inf) = 0.
      for (int v = 0; v < kVecs; ++v) {
        shift[v] = select((vi)(r.m[v] == splat(-kInfinity)), zero(), -r.m[v]);
        sum[0][v] = sum[1][v] = zero();
      }
    }

    // Step often enough for all of it to fit beside `groups` products of `cells` steps each.
    void spread(int64_t groups, int64_t cells) {
      int64_t pairs = max64(1, (left / 2 + groups - 1) / groups);
      every = max64(1, cells / (kVecs * pairs));
    }

    template <int v>
    inline __attribute__((always_inline)) void step(Vector<v>) {
      if (left == 0) return;
      two_keys<v>();
      if constexpr (v == kVecs - 1) {
        next_keys();
        left -= 2;
      }
    }
    // Lanes v of the two keys at hand.
    template <int v>
    inline __attribute__((always_inline)) void two_keys() {
      vf x = load(scores + v * VL), y = load(scores + kM + v * VL);
      if constexpr (kScaledQueries)
        x = exp2(x + shift[v]), y = exp2(y + shift[v]);
      else
        x = exp2(fma(x, scale, shift[v])), y = exp2(fma(y, scale, shift[v]));
      sum[0][v] = sum[0][v] + x;
      sum[1][v] = sum[1][v] + y;
      if constexpr (kDropout) {
        x = x * load(keep + v * VL);
        y = y * load(keep + kM + v * VL);
      }
      if constexpr (Cells::kPerCell == 1) {
        store(probs + v * VL, x);
        store(probs + kM + v * VL, y);
      } else {
        store_i(probs + v * VL, pack_pairs(x, y));
      }
    }
    inline __attribute__((always_inline)) void next_keys() {
      scores += 2 * kM;
      if constexpr (kDropout) keep += 2 * kM;
      probs += 2 / Cells::kPerCell * kM;
    }
    // Two keys of the vectors from kFirst on.
    template <int kFirst>
    inline __attribute__((always_inline)) void lanes_from() {
      if constexpr (kFirst <= 0) two_keys<0>();
      if constexpr (kFirst <= 1) two_keys<1>();
      if constexpr (kVecs > 2) two_keys<kVecs - 1>();
      next_keys();
    }
    __attribute__((always_inline)) void finish() {
      for (; left > 0; left -= 2) lanes_from<0>();
      for (int64_t n = ends.of[0]; n < ends.of[1]; n += 2) lanes_from<1>();
      if constexpr (kVecs > 2)
        for (int64_t n = ends.of[1]; n < ends.of[kVecs - 1]; n += 2) lanes_from<kVecs - 1>();
    }
  };

  // Probabilities that wait for their product with V: the exponentials of the next tile run beside it.
  struct Waiting {
    Row* row = nullptr;
    float* o;
    Columns v;
    float* probs;
    Ends ends;  // in cells
    bool v_not_finite;
  };
  Waiting waiting;
  int turn = 0;  // which of the two tiles of probabilities is next

  struct Task {
    int64_t b, h, m;
  };

  void run(Task task, const Task* next) {
    int64_t b = task.b, h = task.h, m_begin = task.m;
    Head s = head_of(p, b, h);
    int64_t count = min64(micros, round_up(s.sq - m_begin, kM) / kM);
    if (count <= 0) return;
    Row rows[kMaxMicros];
    for (int64_t i = 0; i < count; ++i) {
      Row& r = rows[i];
      make_lanes(p, s, m_begin + i * kM, r.lanes);
      for (int v = 0; v < kVecs; ++v) r.m[v] = splat(-kInfinity), r.l[v] = zero();
      r.started = false;
      float* q = qt + i * kM * cells;
      rows_to_lanes<Cells>(q_row<T>(p, s, r.lanes.m0), p.q_stride[1], r.lanes.rows, p.headdim, q);
      if (kScaledQueries && !modified) scale_lanes(q, p.scale * kLog2e, cells);
    }
    int64_t end = rows[count - 1].lanes.end;
    KeyTiles<T, Cells> tiles(p, s, cells, groups, k_tile, v_tile);
    for (int64_t n0 = rows[0].lanes.begin / kRows * kRows; n0 < end; n0 += block_n) {
      tiles.start(n0, min64(block_n, end - n0));
      look_ahead(s, m_begin, tiles.count, n0 + block_n, end, count, next);
      seen = mask_span(p, s, tiles.n0, tiles.count);
      for (int64_t i = 0; i < count; ++i) micro(s, rows[i], i, tiles);
    }
    multiply();
    for (int64_t i = 0; i < count; ++i) finish(s, rows[i], ot + i * kM * groups * kRows);
    if (around_cache) stream_fence();
  }

  T* o_row(const Head& s, int64_t m) const {
    return static_cast<T*>(p.o) + s.b * p.o_stride[0] + (s.q_start + m) * p.o_stride[1] + s.h * p.o_stride[2];
  }

  // What comes after this tile of `now` keys: the next one of this task, or its results and the first tile and queries of the next
  // task.
  void look_ahead(const Head& s, int64_t m_begin, int64_t now, int64_t n0, int64_t end, int64_t blocks, const Task* next) {
    k_ahead = v_ahead = q_ahead = o_ahead = Ahead{};
    if (p.block_table != nullptr) return;
    int64_t keys = min64(block_n, end - n0);
    if (keys > 0) {
      set_ahead(s, n0, keys);
    } else if (!around_cache) {
      o_ahead = ahead(o_row(s, m_begin), p.o_stride[1], p.headdim_v, min64(blocks * kM, s.sq - m_begin));
    }
    if (keys <= 0 && next != nullptr) {
      Head t = head_of(p, next->b, next->h);
      int64_t first = min64(t.sk, first_key(p, t, next->m)), rows = min64(micros * kM, t.sq - next->m);
      q_ahead = ahead(q_row<T>(p, t, next->m), p.q_stride[1], p.headdim, rows);
      if (t.hk != s.hk || t.b != s.b) set_ahead(t, first, min64(block_n, t.sk - first));
    }
    int64_t steps = max64(1, blocks * (now / kRows));
    step_rows = (max64(k_ahead.rows, max64(q_ahead.rows, o_ahead.rows)) + steps - 1) / steps;
  }
  void set_ahead(const Head& s, int64_t n0, int64_t keys) {
    k_ahead = ahead(key_row<T>(p, s, p.k, p.k_stride, n0), p.k_stride[1], p.headdim, keys);
    v_ahead = ahead(key_row<T>(p, s, p.v, p.v_stride, n0), p.v_stride[1], p.headdim_v, keys);
  }

  // The bias of the tile at hand: the first product gives its rows the time to arrive.
  Ahead bias_rows(const Head& s, const Lanes& lanes, int64_t n0, int64_t count) {
    const int64_t* st = p.bias_stride;
    if (p.bias == nullptr || st[2] == 0 || st[3] != 1) return Ahead{};
    int64_t at = s.b * st[0] + s.h * st[1] + lanes.m0 * st[2] + n0;
    if (p.bias_dtype == 0) return ahead(static_cast<const float*>(p.bias) + at, st[2], count, lanes.rows);
    return ahead(static_cast<const bf16*>(p.bias) + at, st[2], count, lanes.rows);  // fp16 is as wide
  }

  // One block of kM queries against one tile of keys.
  void micro(const Head& s, Row& r, int64_t index, KeyTiles<T, Cells>& tiles) {
    int64_t begin = max64(seen.begin, r.lanes.begin), end = min64(seen.end, r.lanes.end);
    if (begin >= end) return;
    // A mask that is a span of keys for all queries is a band.
    Sight sight = seen.solid && !modified ? Sight::all : mask_sight(p, s, r.lanes.m0, r.lanes.rows, begin, end - begin);
    if (sight == Sight::none) return;
    int64_t skip = (begin - tiles.n0) / kRows * kRows;
    int64_t n0 = tiles.n0 + skip, count = round_up(end - n0, kRows);
    // The options see to the band, but only a mask that is looked at hides what the rounding to kRows adds to the span.
    if (modified && p.mask != nullptr && (n0 < seen.begin || n0 + count > seen.end)) sight = Sight::some;
    CellRows k = tiles.k();
    k.at += skip * k.ld;

    bool rewritten = modified || sight != Sight::all;  // a pass over the tile that also sees to the band
    int64_t plain_begin = max64(begin, r.lanes.full_begin) - n0, plain_end = min64(end, r.lanes.full_end) - n0;
    bool banded = !rewritten && (plain_begin > 0 || plain_end < count);
    Band band;
    if (banded) band = Band::of(r.lanes, n0, begin - n0, end - n0);
    vf top[kVecs];
    for (int v = 0; v < kVecs; ++v) top[v] = splat(-kInfinity);
    bias_ahead = bias_rows(s, r.lanes, n0, min64(count, s.sk - n0));
    Ends ends;  // The first lanes of a diagonal see fewer keys.
    for (int v = 0; v < kVecs; ++v)
      ends.of[v] = banded ? max64(0, min64(count, round_up(r.lanes.last[(v + 1) * VL - 1] - n0, kRows))) : count;
    const float* q = qt + index * kM * cells;
    int64_t before = (cells - 1) / kChain * kChain;  // cells that earlier, shorter chains have summed
    if (before > 0) product_rows<Cells>(k.at, k.ld, q, kM, count, before, scores, kM, false);
    for (int64_t n = 0; n < count; n += kRows) {
      float* to = scores + n * kM;
      k_ahead.fetch(step_rows);
      v_ahead.fetch(step_rows);
      q_ahead.fetch(step_rows);
      o_ahead.fetch(step_rows);
      bias_ahead.fetch(kM * kRows / count + 1);
      const float *a = k.at + n * k.ld + before, *b = q + before * kM;
      auto whole = [&](int i, int v, vf x) { return before > 0 ? x + load(to + i * kM + v * VL) : x; };
      auto keep_cut = [&](int i, int v, vf x) __attribute__((always_inline)) {
        x = band.cut(v, n + i, whole(i, v, x));
        store(to + i * kM + v * VL, x);
        top[v] = max(top[v], x);
      };
      if (n >= ends.of[0] && n >= ends.of[kVecs - 2])
        block_product<Cells, kVecs - 1>(a, k.ld, 1, b, kM, cells - before, keep_cut);
      else if (n >= ends.of[0])
        block_product<Cells, 1>(a, k.ld, 1, b, kM, cells - before, keep_cut);
      else if (banded && (n < plain_begin || n + kRows > plain_end))
        block_product<Cells>(a, k.ld, 1, b, kM, cells - before, keep_cut);
      else
        block_product<Cells>(a, k.ld, 1, b, kM, cells - before, [&](int i, int v, vf x) {
          x = whole(i, v, x);
          store(to + i * kM + v * VL, x);
          top[v] = max(top[v], x);
        });
    }
    if (rewritten) {
      for (int v = 0; v < kVecs; ++v) top[v] = splat(-kInfinity);
      apply_options(p, s, r.lanes, n0, count, sight, modified, scores, pairs, top, nullptr, kScaledQueries);
    }
    float* o = ot + index * kM * groups * kRows;
    if (waiting.row == &r) multiply();  // before o is rescaled
    update_maximum(r, top, o);
    float* probs = tiles_of_probs[turn];
    if (p.dropout) {
      apply_dropout(p, s, r.lanes.m0, n0, count, keep);
      multiply();
      Exponentials<true> exponentials(r, c, scores, probs, keep, ends);
      exponentials.finish();
      r.add(exponentials.sum);
    } else {
      Exponentials<false> exponentials(r, c, scores, probs, nullptr, ends);
      if constexpr (kBeside) multiply_beside(exponentials);
      exponentials.finish();
      r.add(exponentials.sum);
    }
    Columns v_cells = tiles.v();
    v_cells.at += skip / Cells::kPerCell * v_cells.col;
    for (int64_t& end : ends.of) end /= Cells::kPerCell;
    waiting = {&r, o, v_cells, probs, ends, tiles.v_not_finite};
    turn ^= 1;
    if (!kBeside) multiply();
  }

  // The product that waits.
  __attribute__((noinline)) void multiply() {
    const Waiting& w = waiting;
    if (w.row == nullptr) return;
    if (__builtin_expect(w.v_not_finite, 0)) {
      int64_t count = w.ends.of[kVecs - 1];
      for (int v = 0; v < kVecs; ++v)
        for (int64_t k = w.ends.of[v]; k < count; ++k) store(w.probs + k * kM + v * VL, zero());
      careful_product<Cells>(w.v, w.probs, groups, count, w.o, w.row->started);
    } else {
      product_groups<Cells>(w.v, w.probs, kM, groups, w.ends.of[0], w.o, kM, w.row->started, NoSide{}, &w.ends);
    }
    w.row->started = true;
    waiting.row = nullptr;
  }

  // The same with exponentials beside it.
  inline __attribute__((always_inline)) void multiply_beside(Exponentials<false>& exponentials) {
    const Waiting& w = waiting;
    if (w.row == nullptr || w.v_not_finite) return multiply();
    exponentials.spread(groups, w.ends.of[0]);
    product_groups<Cells>(w.v, w.probs, kM, groups, w.ends.of[0], w.o, kM, w.row->started, exponentials, &w.ends);
    w.row->started = true;
    waiting.row = nullptr;
  }

  // The reference maximum follows lazily; o and l are rescaled when it moves.
  void update_maximum(Row& r, const vf (&top)[kVecs], float* o) {
    vi grew = splat_i(0);
    for (int v = 0; v < kVecs; ++v) grew |= (vi)(top[v] * splat(c) > r.m[v] + splat(kLazyRescale));
    if (!any(grew)) return;
    vf factor[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      vf next = max(top[v] * splat(c), r.m[v]);
      factor[v] = select((vi)(r.m[v] == next), splat(1.0f), exp2<6>(r.m[v] - next));
      r.m[v] = next;
      r.l[v] = r.l[v] * factor[v];
    }
    if (!r.started) return;
    for (int64_t d = 0; d < groups * kRows; ++d)
      for (int v = 0; v < kVecs; ++v) store(o + d * kM + v * VL, load(o + d * kM + v * VL) * factor[v]);
  }

  void finish(const Head& s, Row& r, const float* o) {
    float factor[kM], lse[kM], m[kM], l[kM];
    for (int v = 0; v < kVecs; ++v) {
      if (p.sinks != nullptr) {
        vf sink = splat(p.sinks[s.h] * kLog2e), m = max(sink, r.m[v]);
        vf rescale = select((vi)(r.m[v] == m), splat(1.0f), exp2<6>(r.m[v] - m));
        // An infinite sink is a logit like any other: -inf adds nothing.
        vf added = select((vi)(sink == m), splat(1.0f), exp2<6>(sink - m));
        vi none = (vi)(m == splat(-kInfinity));
        r.l[v] = select(none, zero(), r.l[v] * rescale + added);
        r.m[v] = m;
        store(factor + v * VL, rescale / r.l[v]);
      } else {
        store(factor + v * VL, splat(1.0f) / r.l[v]);
      }
      store(m + v * VL, r.m[v]);
      store(l + v * VL, r.l[v]);
    }
    log_sums(m, l, lse, kM);
    for (int v = 0; v < kVecs; ++v) {
      vi empty = (vi)(r.l[v] == zero());
      store(factor + v * VL, select(empty, zero(), load(factor + v * VL)));
      store(lse + v * VL, select(empty, splat(-kInfinity), load(lse + v * VL)));
    }
    T* to = o_row(s, r.lanes.m0);
    if (r.started) {
      lanes_to_rows(o, factor, r.lanes.rows, p.headdim_v, to, p.o_stride[1], around_cache);
    } else {
      for (int64_t i = 0; i < r.lanes.rows; ++i)
        for (int64_t d = 0; d < p.headdim_v; ++d) to[i * p.o_stride[1] + d] = T{};
    }
    if (p.lse != nullptr) {
      float* lse_to = p.lse + s.b * p.lse_stride[0] + s.h * p.lse_stride[1] + s.q_start + r.lanes.m0;
      __builtin_memcpy(lse_to, lse, r.lanes.rows * sizeof(float));
    }
  }
};

// Another core may hold the lines of o from the last time that its memory was used, and nobody needs what is in them: with
// several threads o goes around the cache, and even who reads all of it next is faster. One thread alone knows its lines.
template <class T>
bool o_around_cache(const AttentionParams& p) {
  auto whole_lines = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % 64 == 0; };
  if (VB < 64 || reinterpret_cast<uintptr_t>(p.o) % 64 != 0 || !whole_lines(p.headdim_v)) return false;
  for (int64_t stride : p.o_stride)
    if (!whole_lines(stride)) return false;
  int64_t rows =
      p.batch * (p.seqlen_q * p.nheads * (p.headdim + p.headdim_v) + p.seqlen_k * p.nheads_k * (p.headdim + p.headdim_v));
  return p.nthreads > 1 || rows * static_cast<int64_t>(sizeof(T)) > kNonTemporalBytes;
}

template <class T, class Cells>
void forward(const AttentionParams& p) {
  // Long tasks pack each tile of keys for more queries; with few heads short ones keep more threads busy.
  int64_t long_tasks = p.batch * p.nheads * round_up(p.seqlen_q, kMaxMicros * kM) / (kMaxMicros * kM);
  int64_t micros = p.seqlen_q >= 1024 || long_tasks >= kManyTasks ? kMaxMicros : kMaxMicros / 2;
  if (p.headdim + p.headdim_v > 256) micros = p.headdim + p.headdim_v > 512 ? 2 : 4;
  micros = min64(micros, round_up(p.seqlen_q, kM) / kM);
  int64_t block = micros * kM, blocks = round_up(p.seqlen_q, block) / block, heads = p.batch * p.nheads;
  bool causal = p.right < kUnbounded, around_cache = o_around_cache<T>(p);
  using Task = typename Forward<T, Cells>::Task;
  // Neighbours share keys, or rows of bias where every batch entry has the same. With a right bound the longest rows go first.
  int64_t copies = p.bias != nullptr && p.bias_stride[0] == 0 ? p.batch : 1;
  auto task_of = [&](int64_t task) {
    int64_t copy = task % copies, rest = task / copies, heads_left = heads / copies;
    int64_t head = causal ? rest % heads_left : rest / blocks;
    int64_t m = causal ? blocks - 1 - rest / heads_left : rest % blocks;
    return Task{copies > 1 ? copy : head / p.nheads, head % p.nheads, m * block};
  };
  parallel_for_ahead(p.nthreads, blocks * heads, [&](int64_t task, int64_t next) {
    Task then = task_of(next < blocks * heads ? next : task);
    Forward<T, Cells>(p, micros, around_cache).run(task_of(task), next < blocks * heads ? &then : nullptr);
  });
}

}  // namespace

void attention_fwd(const AttentionParams& p) {
  if (p.seqlen_q <= 0 || p.batch <= 0) return;
  if (p.dtype == 0) return forward<float, FloatCells>(p);
  if (p.dtype == 2) return forward<f16, FloatCells>(p);
#if defined(__AVX512BF16__)
  return forward<bf16, PairCells>(p);
#else
  return forward<bf16, FloatCells>(p);
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
