// Each sm_80 verb alone, as its header documents it. One warp, unless said otherwise.
#pragma once
#include <trial_params.h>

#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>
#include <ptx/mma.cuh>
#include <ptx/stmatrix.cuh>

// out [16, 8] += a [16, 16] · b [16, 8], float32 += T · T, with the fragments gathered element by element.
template <class T>
__global__ void __launch_bounds__(32) mma_kernel(const __grid_constant__ TrialParams p) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  float* out = static_cast<float*>(p.out);
  u32 x[4], y[2];
  for (int i = 0; i < 4; ++i) {
    const T* at = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;
    x[i] = static_cast<u32>(at[1].bits) << 16 | at[0].bits;
  }
  for (int i = 0; i < 2; ++i) {
    const T* at = b + (t + 8 * i) * 8 + g;
    y[i] = static_cast<u32>(at[8].bits) << 16 | at[0].bits;
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = out[(g + i / 2 * 8) * 8 + t + i % 2];
  mma_m16n8k16<T>(d, x, y);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + t + i % 2] = d[i];
}

// a: four 8x8 matrices of 16 bits, one after the other; out [32 lanes, 4] u32. n: 0 x4, 1 x4_transposed, 2 x2, 3 x2_transposed.
__global__ void __launch_bounds__(32) ldmatrix_kernel(const __grid_constant__ TrialParams p) {
  u32* memory = reinterpret_cast<u32*>(shared_memory());
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) memory[4 * lane + i] = static_cast<const u32*>(p.a)[4 * lane + i];
  __syncwarp();
  const void* row = memory + 4 * lane;
  u32 r[4] = {0, 0, 0, 0}, half[2];
  if (p.n == 0) ldmatrix_x4(r, row);
  if (p.n == 1) ldmatrix_x4_transposed(r, row);
  if (p.n >= 2) {
    if (p.n == 2) ldmatrix_x2(half, row);
    if (p.n == 3) ldmatrix_x2_transposed(half, row);
    r[0] = half[0], r[1] = half[1];
  }
  for (int i = 0; i < 4; ++i) static_cast<u32*>(p.out)[4 * lane + i] = r[i];
}

// The reverse: a [32 lanes, 4] u32; out: four (x2: two) matrices.
__global__ void __launch_bounds__(32) stmatrix_kernel(const __grid_constant__ TrialParams p) {
  u32* memory = reinterpret_cast<u32*>(shared_memory());
  const int lane = threadIdx.x;
  u32 r[4], half[2];
  for (int i = 0; i < 4; ++i) r[i] = static_cast<const u32*>(p.a)[4 * lane + i];
  half[0] = r[0], half[1] = r[1];
  void* row = memory + 4 * lane;
  if (p.n == 0) stmatrix_x4(row, r);
  if (p.n == 1) stmatrix_x4_transposed(row, r);
  if (p.n == 2) stmatrix_x2(row, half);
  if (p.n == 3) stmatrix_x2_transposed(row, half);
  __syncwarp();
  if (p.n < 2 || lane < 16) store_16(static_cast<u32*>(p.out) + 4 * lane, load_shared_16(row));
}

// out = the first n bytes of a, zeros behind: 16-byte copies, then (out + 512) 4-byte copies.
__global__ void __launch_bounds__(32) cp_async_kernel(const __grid_constant__ TrialParams p) {
  u8* memory = shared_memory();
  const u8* a = static_cast<const u8*>(p.a);
  const int lane = threadIdx.x;
  cp_async_16(memory + 16 * lane, a + 16 * lane, 16 * lane < p.n);
  cp_async_commit();
  for (int i = 0; i < 4; ++i) cp_async_4(memory + 512 + 4 * (lane + 32 * i), a + 4 * (lane + 32 * i), 4 * (lane + 32 * i) < p.n);
  cp_async_commit();
  cp_async_wait<1>();
  store_16(static_cast<u8*>(p.out) + 16 * lane, load_shared_16(memory + 16 * lane));
  cp_async_wait<0>();
  __syncwarp();
  store_16_streamed(static_cast<u8*>(p.out) + 512 + 16 * lane, load_shared_16(memory + 512 + 16 * lane));
}

// a [n] float; out [n, 4] u32: from_float, pack(x, 1), the parts of unpack(pack(1, x)) as float.
template <class T>
__global__ void __launch_bounds__(32) convert_kernel(const __grid_constant__ TrialParams p) {
  for (int i = threadIdx.x; i < p.n; i += 32) {
    float x = static_cast<const float*>(p.a)[i];
    u32* out = static_cast<u32*>(p.out) + 4 * i;
    T y = from_float<T>(x);
    float2 pair = unpack<T>(pack<T>(1.0f, x));
    out[0] = y.bits;
    out[1] = pack<T>(x, 1.0f);
    out[2] = __float_as_uint(pair.y);
    out[3] = __float_as_uint(to_float(y)) == out[2] && pair.x == 1.0f;
  }
}

// a [n] float; out [n, 3]: exp2_approx, log2_approx, rcp_approx.
__global__ void __launch_bounds__(32) math_kernel(const __grid_constant__ TrialParams p) {
  for (int i = threadIdx.x; i < p.n; i += 32) {
    float x = static_cast<const float*>(p.a)[i];
    float* out = static_cast<float*>(p.out) + 3 * i;
    out[0] = exp2_approx(x), out[1] = log2_approx(x), out[2] = rcp_approx(x);
  }
}

// out [8, 64] int, of two warps: shuffles, votes, a match, block-wide votes, where each thread is, a ticket.
__global__ void __launch_bounds__(64) builtin_kernel(const __grid_constant__ TrialParams p) {
  const int t = threadIdx.x, lane = t % 32;
  int* out = static_cast<int*>(p.out);
  int* tickets = reinterpret_cast<int*>(shared_memory());
  if (t == 0) *tickets = 0;
  out[t] = __shfl_sync(0xffffffffu, t, 5, 8);
  out[64 + t] = __shfl_up_sync(0xffffffffu, t, 3);
  out[128 + t] = __shfl_down_sync(0xffffffffu, t, 3, 16);
  out[192 + t] = __shfl_xor_sync(0xffffffffu, t, 9);
  out[256 + t] = static_cast<int>(__ballot_sync(0xffffffffu, t % 3 == 0));
  out[320 + t] =
      __any_sync(0xffffffffu, t == 40) + 2 * __all_sync(0xffffffffu, t < 32) + 4 * (lane < 8 ? __all_sync(0xffu, lane < 8) : 0);
  int count = __syncthreads_count(t % 4 == 0), both = __syncthreads_and(t < 64), one = __syncthreads_or(t == 63);
  out[384 + t] = count + 1000 * both + 10000 * one + 100000 * __popc(__match_any_sync(0xffffffffu, t % 2));
  out[448 + t] = atomicAdd(tickets, 1);
}
