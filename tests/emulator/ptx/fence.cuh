// Stands in for csrc/cuda/ptx/fence.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ void fence_async_shared() { emulator::fence_async(); }
__forceinline__ void fence_async() { emulator::fence_async(); }
