// Stands in for csrc/cuda/ptx/flag.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ int load_acquire(const int* p) { return static_cast<int>(emulator::load_acquire(p)); }
__forceinline__ void add_release(int* p, int x) { emulator::add_release(p, static_cast<u32>(x)); }
