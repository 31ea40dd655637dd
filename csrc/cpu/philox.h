// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC11), VL counters side by side.
#pragma once
#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

struct Philox {
  vu word[4];
};

FASTATTN_INLINE void multiply(uint32_t factor, vu x, vu& high, vu& low) {
  typedef uint64_t wide __attribute__((vector_size(2 * VB)));
  wide product = __builtin_convertvector(x, wide) * uint64_t{factor};
  high = __builtin_convertvector(product >> 32, vu);
  low = __builtin_convertvector(product, vu);
}

FASTATTN_INLINE Philox philox(vu c0, vu c1, vu c2, vu c3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply(0xD2511F53u, c0, high0, low0);
    multiply(0xCD9E8D57u, c2, high1, low1);
    vu next0 = high1 ^ c1 ^ (vu)splat_i((int32_t)key0), next2 = high0 ^ c3 ^ (vu)splat_i((int32_t)key1);
    c0 = next0;
    c1 = low1;
    c2 = next2;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
