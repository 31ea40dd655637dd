// Matrix products of one warp from registers (sm_80), accumulated in float32.
#pragma once
#include <ptx/core.cuh>

// d [16, 8] += a [16, 16] · b [16, 8], T bf16 or f16, two elements per register, the first one low. With g = lane / 4 and
// t = 2 (lane % 4):
//   a[0] = A[g][t, t+1]   a[1] = A[g + 8][t, t+1]   a[2] = A[g][t + 8, t + 9]   a[3] = A[g + 8][t + 8, t + 9]
//   b[0] = B[t, t+1][g]   b[1] = B[t + 8, t + 9][g]
//   d[0], d[1] = D[g][t, t+1]   d[2], d[3] = D[g + 8][t, t+1]
// so a tile of D, packed to T, is an A: of the 8-wide tiles 2j and 2j+1 the registers are those of k-step j.
template <class T>
void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
__forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
