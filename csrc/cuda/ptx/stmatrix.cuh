// Moves 8x8 matrices of 16-bit elements from the registers of a warp to shared memory, the reverse of ldmatrix (sm_90).
// Lane l gives the address of one row of 8 elements (16 bytes, aligned): lanes 0-7 the rows of matrix 0, lanes 8-15 those of
// matrix 1, and so on. Lane l holds of each matrix the elements [l / 4][2 (l % 4)] and the next of the row, the first one low;
// with _transposed these are elements of the transposed matrix: [2 (l % 4)][l / 4] and the next of the column are written.
// These are writes of the generic proxy: fence_async_shared before TMA or wgmma reads them.
#pragma once
#include <ptx/core.cuh>

__forceinline__ void stmatrix_x4(void* row, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
__forceinline__ void stmatrix_x4_transposed(void* row, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// Only lanes 0-15 give addresses.
__forceinline__ void stmatrix_x2(void* row, const u32 (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1])
               : "memory");
}
__forceinline__ void stmatrix_x2_transposed(void* row, const u32 (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1])
               : "memory");
}
