// Stands in for csrc/cuda/ptx/tma.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ void tma_prefetch_map(const TensorMap& map) { emulator::tma_prefetch(&map); }

// The coordinates of 2 to 5 dimensions.
template <class... X>
__forceinline__ void tma_load(void* shared, const TensorMap& map, u64* barrier, int x0, int x1, X... x) {
  emulator::tma_load(shared, &map, barrier, 0, 2 + sizeof...(x), x0, x1, x...);
}
template <class... X>
__forceinline__ void tma_load_multicast(void* shared, const TensorMap& map, u64* barrier, u16 blocks, int x0, int x1, X... x) {
  if (blocks != 0) emulator::tma_load(shared, &map, barrier, blocks, 2 + sizeof...(x), x0, x1, x...);
}
template <class... X>
__forceinline__ void tma_store(const TensorMap& map, const void* shared, int x0, int x1, X... x) {
  emulator::tma_store(&map, shared, false, 2 + sizeof...(x), x0, x1, x...);
}
template <class... X>
__forceinline__ void tma_reduce_add(const TensorMap& map, const void* shared, int x0, int x1, X... x) {
  emulator::tma_store(&map, shared, true, 2 + sizeof...(x), x0, x1, x...);
}

__forceinline__ void bulk_load(void* shared, const void* global, u32 bytes, u64* barrier) {
  emulator::bulk_load(shared, global, bytes, barrier);
}
__forceinline__ void bulk_store(void* global, const void* shared, u32 bytes) { emulator::bulk_store(global, shared, bytes); }
__forceinline__ void bulk_reduce_add(float* global, const float* shared, u32 bytes) {
  emulator::bulk_reduce_add(global, shared, bytes);
}
__forceinline__ void bulk_commit() { emulator::bulk_commit(); }
template <int kPending>
__forceinline__ void bulk_wait_read() {
  emulator::bulk_wait_read(kPending);
}
template <int kPending>
__forceinline__ void bulk_wait() {
  emulator::bulk_wait(kPending);
}
