// How a block of the Hopper forward goes about its work, what its specialisation can do, and how it divides its threads, registers
// and shared memory.
#pragma once
#include <ptx/core.cuh>
#include <tile/bias_sm90.cuh>
#include <tile/schedule_sm90.cuh>

// How a specialisation goes about it; results differ in rounding at most.
constexpr u32 kOverlap = 1;     // the scores of the next tile are under way during this one's softmax
constexpr u32 kPingPong = 2;    // consumers take turns at the tensor cores
constexpr u32 kLazy = 4;        // o is rescaled only when a maximum grew by 2^8
constexpr u32 kPolynomial = 8;  // a quarter of the exponentials on the FMA pipes
constexpr u32 kDynamic = 16;    // work is handed out by a counter
constexpr u32 kApart = 32;      // o is staged in its own memory, not in q's, so that the next q can come early
constexpr u32 kMulticast = 64;  // two blocks of a cluster need the same k and v, and each loads half of every tile for both
// What a specialisation can do beyond scale, band, packed sequences and sinks.
constexpr u32 kGeneral = 1;  // softcap, ALiBi, or a scale that is not positive: scores are finished before the maximum
constexpr u32 kMask = 2;
constexpr u32 kBias = 4;  // an additive bias; without kTile with kGeneral and element by element: where TMA cannot read it
constexpr u32 kDropout = 8;
constexpr u32 kTile = 16;  // with kBias: by TMA, in tiles
constexpr u32 kRow = 32;   // with kTile: all queries share one row
constexpr u32 kWide = 64;  // with kTile: of floats, else of q's type

template <int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, int kStages, u32 kWays, u32 kPairs>
struct Plan {
  static constexpr bool kHas(u32 way) { return (kWays & way) != 0; }
  static constexpr bool kMasked = (kPairs & kMask) != 0, kBiased = (kPairs & kTile) != 0;
  using Bias = BiasTile<BLOCK_M, BLOCK_N, (kPairs & kRow) != 0, (kPairs & kWide) != 0>;
  static constexpr int kGroups = BLOCK_M / 64;  // consumer warpgroups
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kBlocks = kGroups == 1 && HEADDIM_V <= 192 ? 2 : 1;  // per multiprocessor
  static constexpr bool kBusy = (kPairs & kBias) != 0 || kHas(kMulticast);  // the producer has more to remember
  // Registers that each consumer gives to the producer, to search the mask and for the above.
  static constexpr int kGiven = (kMasked ? (kGroups == 1 ? 16 : 8) : 0) + (kBusy && kGroups < 3 ? 8 : 0);
  static constexpr int kProducerRegisters = (kGroups == 3 ? 32 : 24) + kGroups * kGiven;
  static constexpr int kConsumerRegisters = (kGroups == 1 ? 232 : kGroups == 2 ? 240 : 160) - kGiven;
  static constexpr int kCluster = kHas(kMulticast) ? 2 : 1, kPart = BLOCK_N / kCluster;  // blocks; rows of a tile that one loads

  static constexpr int kPanels = (HEADDIM + 63) / 64, kPanelsV = (HEADDIM_V + 63) / 64;
  static constexpr int kPanelQ = 64 * 128, kPanelK = BLOCK_N * 128;  // bytes
  static constexpr int kLoadQ = kPanels * kPanelQ, kLoadK = kPanels * kPanelK, kLoadV = kPanelsV * kPanelK;
  static constexpr int kO = kPanelsV * kPanelQ;                              // of one consumer
  static constexpr int kQ = kHas(kApart) || kLoadQ > kO ? kLoadQ : kO;       // of one consumer
  static constexpr int kAtK = kGroups * kQ, kAtV = kAtK + kStages * kLoadK;  // offsets
  static constexpr int kAtO = kAtV + kStages * kLoadV;
  static constexpr int kAtBias = kAtO + (kHas(kApart) ? kGroups * kO : 0);
  static constexpr int kAtBarriers = kAtBias + (kBiased ? kStages * Bias::kBytes : 0);
  static constexpr int kBarriers = 6 * kStages + 2 * kGroups + 2 * DynamicSchedule::kSlots;
  static constexpr int kAtNumbers = kAtBarriers + 8 * kBarriers;  // of work and, with kMask, of tiles
  static constexpr int kBytes = kAtNumbers + 4 * (DynamicSchedule::kSlots + kStages);
  static_assert(BLOCK_M % 64 == 0 && kGroups <= 3 && BLOCK_N % 16 == 0 && BLOCK_N <= 256 && HEADDIM % 16 == 0, "");
  static_assert(kBytes <= 227 * 1024 / kBlocks - 1024 * (kBlocks - 1), "");
  static_assert(!kHas(kMulticast) || !kHas(kDynamic), "the blocks of a cluster would have to agree on what was drawn");
};

// Named barriers: 0 is __syncthreads's.
constexpr u32 kTurnBarrier = 1;   // + consumer: its turn to multiply
constexpr u32 kStageBarrier = 4;  // + consumer: among its own threads
