// Stands in for csrc/cuda/ptx/opaque.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ int opaque(int x) { return x; }
__forceinline__ u32 opaque(u32 x) { return x; }
__forceinline__ i64 opaque(i64 x) { return x; }
