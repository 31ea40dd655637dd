// Dropout's random words: Philox4x32-10 (Salmon et al., SC11), the words that fastattn/ops/attention/_philox.py defines.
#pragma once
#include <ptx/core.cuh>

struct Philox {
  u32 key0, key1, offset;
};

__forceinline__ Philox load_philox(const i64* philox) {
  u64 seed = static_cast<u64>(philox[0]);
  return {static_cast<u32>(seed), static_cast<u32>(seed >> 32), static_cast<u32>(philox[1])};
}

// The words of query m and keys 4 n4 … 4 n4 + 3; head is batch · nheads + head.
__forceinline__ uint4 philox_words(const Philox& philox, u32 n4, u32 m, u32 head) {
  u32 c0 = n4, c1 = m, c2 = head, c3 = philox.offset, key0 = philox.key0, key1 = philox.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    u64 product0 = static_cast<u64>(0xD2511F53u) * c0, product1 = static_cast<u64>(0xCD9E8D57u) * c2;
    c0 = static_cast<u32>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<u32>(product1);
    c2 = static_cast<u32>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<u32>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Words of the four pairs that a lane holds of an accumulator [16, 8] of mma_m16n8k16 whose rows are queries from m0 and
// whose columns are keys from n0 on (a multiple of 8). Of two neighbouring lanes one draws for row g, one for row g + 8.
__forceinline__ uint4 philox_fragment(const Philox& philox, int n0, int m0, u32 head) {
  u32 lane = threadIdx.x & 31, odd = lane & 1;
  u32 n4 = static_cast<u32>(n0 >> 2) + (lane >> 1 & 1);
  uint4 mine = philox_words(philox, n4, static_cast<u32>(m0) + (lane >> 2) + 8 * odd, head);
  u32 x = __shfl_xor_sync(0xffffffffu, odd ? mine.x : mine.z, 1);
  u32 y = __shfl_xor_sync(0xffffffffu, odd ? mine.y : mine.w, 1);
  return odd ? make_uint4(x, y, mine.z, mine.w) : make_uint4(mine.x, mine.y, x, y);
}

// The same for a transposed accumulator [16, 8]: rows are keys from n0 on (a multiple of 8), columns are queries from m0
// on. The four lanes of neighbouring keys draw one each of the two queries times two groups of keys, and exchange.
__forceinline__ uint4 philox_fragment_transposed(const Philox& philox, int n0, int m0, u32 head) {
  u32 lane = threadIdx.x & 31, i = lane >> 2 & 3;
  u32 n4 = static_cast<u32>(n0 >> 2) + (lane >> 4 & 1) + (i & 2);
  uint4 mine = philox_words(philox, n4, static_cast<u32>(m0) + 2 * (lane & 3) + (i & 1), head);
  u32 found[4];  // found[c] is word i of draw i ^ c, and draw d is the pair of query d & 1 and key g + 8 (d >> 1)
#pragma unroll
  for (u32 c = 0; c < 4; ++c) {
    u32 low = (i ^ c) & 1 ? mine.y : mine.x, high = (i ^ c) & 1 ? mine.w : mine.z;
    found[c] = __shfl_xor_sync(0xffffffffu, (i ^ c) & 2 ? high : low, static_cast<int>(4 * c));
  }
  u32 a = i & 1 ? found[1] : found[0], b = i & 1 ? found[0] : found[1];
  u32 c = i & 1 ? found[3] : found[2], d = i & 1 ? found[2] : found[3];
  return i & 2 ? make_uint4(c, d, a, b) : make_uint4(a, b, c, d);
}
