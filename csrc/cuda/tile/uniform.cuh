// A number that is the same in all lanes of a warp, and that the compiler then knows to be so: without it, every shuffle
// behind a branch on it gets a second, slow road for lanes that have parted.
#pragma once
#include <ptx/core.cuh>

__forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
