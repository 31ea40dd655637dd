// What the Hopper forward does with a tile of raw products before the softmax, and with the probabilities behind it.
#pragma once
#include <ptx/core.cuh>
#include <tile/mask_sm90.cuh>
#include <tile/philox.cuh>
#include <tile/plan_sm90.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>

// What a tile's scores become before their maximum is taken; rows are this warp's, from m on. seen: with kMask, from load_seen.
// add_tile: with kTile, adds the tile of the bias.
template <class T, u32 kPairs, bool kHidden, int kTiles, class AddTile, class Params>
__forceinline__ void finish_scores(float (&s)[kTiles][4], const Params& p, const Sequence& sequence, const ScoreRule& rule,
                                   const Corner& corner, const u32 (&seen)[2], AddTile add_tile) {
  if constexpr (kPairs & kGeneral) score_tile(s, rule, sequence, corner);
  if constexpr (kPairs & kTile) {
    add_tile();
  } else if constexpr (kPairs & kBias) {
    if (p.bias_float) {
      add_bias(s, pairs_of<float>(p.bias, p.bias_stride, sequence), corner);
    } else {
      add_bias(s, pairs_of<T>(p.bias, p.bias_stride, sequence), corner);
    }
  }
  if constexpr (kPairs & kMask) {
    hide_unseen(s, seen);
  } else if constexpr (kHidden) {
    hide_by_position(s, corner);
  }
}

template <int kTiles>
__forceinline__ void drop(float (&s)[kTiles][4], const Philox& philox, u32 threshold, int m, int n0, u32 head) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    uint4 words = philox_fragment(philox, n0 + 8 * j, m, head);
    if (words.x < threshold) s[j][0] = 0.0f;
    if (words.y < threshold) s[j][1] = 0.0f;
    if (words.z < threshold) s[j][2] = 0.0f;
    if (words.w < threshold) s[j][3] = 0.0f;
  }
}
