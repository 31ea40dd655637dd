// Which keys a block of the Hopper backward has, and the walk over the tiles of queries that see them.
#pragma once
#include <ptx/core.cuh>
#include <tile/band.cuh>
#include <tile/mask_sm90.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>

// A block of keys. It lies in shared memory, where it takes no registers from the loop.
struct BwdWork {
  static constexpr int kBytes = 96;  // room for it
  Sequence first;                    // of the group's first head
  int n0, n1;                        // keys; n0 -1: there is no work
  int lo, last, tiles;               // the first and the last tile of queries that see them, and how many of one head
  int whole_lo, whole_hi;            // who sees all of the block
  int steps;                         // tiles that are computed: of all heads of the group, but for those that a mask hides
  int hides;                         // 1: a tile holds a pair that is not seen
  int flag_tile, flag_head;          // how far the flags of neighbouring tiles and heads lie apart
  int number;                        // of the block's works
  // Of the barriers of k and v.
  template <bool kRepeats>
  __forceinline__ u32 parity() const {
    return kRepeats ? number & 1 : 0;
  }
  __forceinline__ bool whole(int m0, int rows) const { return m0 >= whole_lo && m0 + rows <= whole_hi; }
};
static_assert(sizeof(BwdWork) <= BwdWork::kBytes, "");

// Number `id` of batch · nheads_k · blocks_n: heads_together heads take turns, block by block of keys. Its number stays.
template <int BLOCK_M, int BLOCK_N, class Params>
__forceinline__ void set_work(BwdWork& w, const Params& p, int id) {
  int group = p.nheads / p.nheads_k, begin = id / (p.blocks_n * p.heads_together) * p.heads_together;
  int together = min(p.heads_together, p.batch * p.nheads_k - begin), rest = id - begin * p.blocks_n;
  int head = begin + rest % together;
  w.first = sequence_of(p, head / p.nheads_k, head % p.nheads_k * group);
  w.n0 = rest / together * BLOCK_N;
  w.n1 = min(w.n0 + BLOCK_N, w.first.seqlen_k);
  Range range = query_range<BLOCK_M>(p, w.first, w.n0, w.n1);
  w.tiles = max(0, (range.hi - range.lo + BLOCK_M - 1) / BLOCK_M);
  w.lo = range.lo;
  w.last = range.lo + (w.tiles - 1) * BLOCK_M;
  w.whole_lo = range.whole_lo;
  w.whole_hi = w.n1 - w.n0 == BLOCK_N ? range.whole_hi : 0;
  w.steps = w.tiles * group;
  w.hides = !w.whole(w.lo, w.tiles * BLOCK_M);
  w.flag_tile = w.flag_head = 0;
}

// A block's next keys, by one thread. Who waits for a turn waits for blocks with lower numbers; numbers are drawn as work begins,
// so that these have begun, whatever order the hardware chooses, and in one block the lower number comes first. kRepeats: keys
// beyond the end of a packed sequence are passed over.
template <int BLOCK_M, int BLOCK_N, bool kRepeats, class Params>
__forceinline__ void draw_work(BwdWork& w, const Params& p) {
#pragma unroll 1
  do {
    const int id = p.drawn != nullptr ? atomicAdd(p.drawn, 1) : static_cast<int>(blockIdx.x);
    w.n0 = -1;
    if (id >= p.blocks_n * p.nheads_k * p.batch) return;
    set_work<BLOCK_M, BLOCK_N>(w, p, id);
    if (w.n0 < w.first.seqlen_k) return;
  } while (kRepeats);
  w.n0 = -1;
}

// The walk over the tiles of queries, last one first, for each head of the group.
template <int BLOCK_M>
struct QueryWalk {
  const BwdWork& work;
  int left, m0, g;  // tiles to come, first query, head of the group
  __forceinline__ QueryWalk(const BwdWork& work, int group) : work(work), left(work.tiles * group), m0(work.last), g(0) {}
  __forceinline__ void next() {
    --left;
    m0 -= BLOCK_M;
    if (m0 < work.lo) {
      m0 = work.last;
      ++g;
    }
  }
  __forceinline__ int flag() const { return (m0 - work.lo) / BLOCK_M * work.flag_tile + g * work.flag_head; }
};

// Marks the tiles that a mask does not hide, by all threads of the block, and counts them. Of more than kFlags tiles none is
// hidden.
template <int BLOCK_M, int kFlags, class Params>
__forceinline__ void find_shown(const Params& p, BwdWork& work, u8* flags) {
  const int group = p.nheads / p.nheads_k, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const bool with_queries = p.mask_stride[2] != 0, with_heads = p.mask_stride[1] != 0;
  const int across = with_queries ? work.tiles : min(work.tiles, 1), count = across * (with_heads ? group : 1);
  const bool looks = count <= kFlags;
  int shown = 0;
#pragma unroll 1
  for (int i = warp; looks && i < count; i += warps) {
    Sequence s = work.first;
    s.h += i / across;
    const int m0 = work.lo + i % across * BLOCK_M;
    const bool any = any_allowed(pairs_of<u8>(p.mask, p.mask_stride, s), m0, min(m0 + BLOCK_M, s.seqlen_q), work.n0, work.n1);
    if (threadIdx.x % 32 == 0) flags[i] = any;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; looks && i - static_cast<int>(threadIdx.x) < count; i += blockDim.x) {
    shown += __syncthreads_count(i < count && flags[i] != 0);
  }
  if (threadIdx.x == 0) {
    if (!looks) flags[0] = 1;
    work.flag_tile = looks && with_queries;
    work.flag_head = looks && with_heads ? across : 0;
    if (looks) work.steps = shown * (with_queries ? 1 : work.tiles) * (with_heads ? 1 : group);
  }
  __syncthreads();
}

// Where the tiles of a block's step lie, and the parity of their barriers' phase; steps are counted over all of its works.
template <int kStages, int kStagesDout>
struct TileRing {
  int step;
  __forceinline__ u32 q_slot() const { return step % kStages; }
  __forceinline__ u32 q_parity() const { return step / kStages % 2; }
  __forceinline__ u32 dout_slot() const { return step % kStagesDout; }
  __forceinline__ u32 dout_parity() const { return step / kStagesDout % 2; }
};

// What the consumers know of a tile, beside its lse.
struct TilePlace {
  int m0, g, whole;  // first query, head of the group, 1: all of its pairs are seen, as far as the band goes
};
