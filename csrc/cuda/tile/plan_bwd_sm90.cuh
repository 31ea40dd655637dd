// How a block of the Hopper backward divides its shared memory, registers and tiles among its consumers, in three ways, told apart
// by BLOCK_N. Narrow (128): a consumer owns 64 keys; scores are [keys, queries]; P and dS stay in its registers as operands of dv
// and dk. Wide (64): scores are [keys, queries], half of the queries each; a consumer has half of the columns of dk and dv. Thirds
// (96): three consumers, for heads of 192; scores are [queries, keys], 32 of the keys each; a consumer has a panel of 64 columns of
// dk, dv and dq. In the latter two P and dS meet in shared memory. Each way dq's tile is one product that the consumers divide.
#pragma once
#include <ptx/core.cuh>
#include <tile/work_bwd_sm90.cuh>

// How a specialisation goes about it; the results are the same.
constexpr u32 kAhead = 1;  // the scores of the next tile are computed behind this one's dq and dk, so that no exponential waits
constexpr u32 kPersistent = 2;  // a block does work after work, and loads the next one's tiles while it stores this one's results
constexpr u32 kApart = 4;       // each consumer has a warp that adds its part of dq, and waits for the others once per tile

template <int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, u32 kWays>
struct BwdPlan {
  static constexpr bool kWide = BLOCK_N == 64, kThirds = BLOCK_N == 96;
  static constexpr bool kIsApart = (kWays & kApart) != 0, kIsPersistent = (kWays & kPersistent) != 0;
  static constexpr int kConsumers = kThirds ? 3 : 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kThirds ? 32 : 24, kConsumerRegisters = kThirds ? 160 : 240;
  static constexpr int kQueries = kWide ? BLOCK_M / 2 : BLOCK_M;          // columns of a consumer's scores
  static constexpr int kColumns = kWide ? HEADDIM / 2 : HEADDIM;          // of dk in a consumer
  static constexpr int kColumnsV = kWide ? HEADDIM_V / 2 : HEADDIM_V;     // of dv
  static constexpr int kRowSlabs = BLOCK_M / 64;                          // of dq's tile
  static constexpr int kRounds = HEADDIM / 64 * kRowSlabs / kConsumers;   // slabs of dq in a consumer, staged one by one
  static constexpr int kPanelM = BLOCK_M * 128, kPanelN = BLOCK_N * 128;  // bytes of 64 columns
  static constexpr int kQ = HEADDIM / 64 * kPanelM, kDout = HEADDIM_V / 64 * kPanelM, kDs = BLOCK_M * 2 * BLOCK_N;
  static constexpr int kK = HEADDIM / 64 * kPanelN, kV = HEADDIM_V / 64 * kPanelN;
  static constexpr int kStagesQ = 2, kStagesDout = HEADDIM_V > 128 ? 1 : 2;
  static constexpr int kStagesDs = kWide || kIsApart ? 2 : 1, kWorks = kIsPersistent ? 3 : 1;
  static constexpr int kAtV = kK, kAtQ = kAtV + kV, kAtDout = kAtQ + kStagesQ * kQ, kAtDs = kAtDout + kStagesDout * kDout;
  static constexpr int kAtP = kAtDs + kStagesDs * kDs, kAtDq = kAtP + (kWide || kThirds ? kDs : 0);
  static constexpr int kAtRows = kAtDq + kConsumers * 4 * 64 * 64;                  // behind a slab of dq of each consumer: lse of
  static constexpr int kAtLost = kAtRows + 4 * BLOCK_M * (kStagesQ + kStagesDout);  // each stage of q, delta of dout; lost keys
  static constexpr int kFlags = 2048;                                               // tiles that a mask shows, a byte each
  static constexpr int kAtFlags = kAtLost + 192, kAtPlaces = kAtFlags + kFlags, kAtWork = kAtPlaces + 16 * kStagesQ;
  static constexpr int kAtDrawing = kAtWork + kWorks * BwdWork::kBytes, kAtBarriers = kAtDrawing + 16;
  static constexpr int kQFull = 0, kDoutFull = kQFull + kStagesQ, kQEmpty = kDoutFull + kStagesDout;  // numbers of barriers
  static constexpr int kDoutEmpty = kQEmpty + kStagesQ, kKFull = kDoutEmpty + kStagesDout, kVFull = kKFull + 1;
  static constexpr int kLoaded = kVFull + 1, kWorkFull = kLoaded + 1, kKEmpty = kWorkFull + 2, kVEmpty = kKEmpty + 1;
  static constexpr int kWorkEmpty = kVEmpty + 1;
  static constexpr int kBarriers = kWorkEmpty + 2, kBytes = kAtBarriers + 8 * kBarriers;
  // How many arrive at a barrier: the loading warp, one thread, a lane of each warp of consumers, and of the adding ones.
  static __forceinline__ int arrivals(int barrier) {
    if (barrier < kQEmpty) return 32;
    if (barrier < kKFull) return 4 * kConsumers;
    if (barrier < kKEmpty) return 1;
    return 4 * kConsumers + (barrier < kWorkEmpty ? 0 : 1 + kAdders);
  }
  static constexpr int kAdders = kIsApart ? kConsumers : 1, kServed = 128 * kConsumers / kAdders;  // threads of an adding warp
  using Ring = TileRing<kStagesQ, kStagesDout>;
  static __forceinline__ TilePlace& place(u8* memory, int slot) {
    return *reinterpret_cast<TilePlace*>(memory + kAtPlaces + 16 * slot);
  }
  static __forceinline__ u8* slab(u8* memory, int group) { return memory + kAtDq + group * (4 * 64 * 64); }
  static __forceinline__ u64* barriers(u8* memory) { return reinterpret_cast<u64*>(memory + kAtBarriers); }
  static_assert(BLOCK_M % 64 == 0 && BLOCK_M <= 128 && (BLOCK_N == 128 || BLOCK_M == 64), "");
  static_assert(!kIsApart || BLOCK_N == 128, "P of the others has one stage");
  static_assert(!kThirds || (HEADDIM == 192 && (HEADDIM_V == 192 || HEADDIM_V == 128)), "");
  static_assert(HEADDIM % 64 == 0 && HEADDIM_V % 64 == 0 && kRounds >= 1 && (!kWide || HEADDIM_V % 128 == 0), "");
  static_assert(kBytes <= 227 * 1024, "");
};

// Named barriers: 0 is __syncthreads's; of the others but the first each consumer has one.
constexpr u32 kConsumerBarrier = 1, kDqFull = 2, kDqEmpty = 5, kDqDone = 8, kOwnBarrier = 11;
