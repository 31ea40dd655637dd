// The copy engine (TMA, sm_90): boxes of tensors between global and shared memory, one thread issuing, and plain runs of bytes.
//
// Tensors. A TensorMap (a field of a __grid_constant__ parameter) says where a tensor of 2 to 5 dimensions lies, how large a box
// is, how the box is swizzled in shared memory. Coordinates count elements, the contiguous dimension first; they may be negative or
// beyond the end: loads fill what lies outside with zeros, stores and additions leave it out. A load brings the full box's bytes to
// its barrier, whatever lay outside. The box in shared memory is [x4][x3][x2][x1][x0] without gaps, at a multiple of 128 bytes
// (1024 for a 128-byte swizzle, 512 and 256 for 64 and 32), 16-byte pieces swizzled as wgmma.cuh's descriptors have it.
//
// Order. Loads complete on an mbarrier that was told their bytes before. Stores and additions read shared memory later: writers
// fence_async_shared and join a barrier before the issuing thread starts; it commits its copies as a group, and bulk_wait_read<n>
// returns when all but its n youngest groups have read their source, bulk_wait<n> when they have also been written to global memory
// (visible to later kernels without any wait). A block must not exit, nor reuse the source, before the read.
#pragma once
#include <ptx/core.cuh>

// Fetches the map itself ahead of its first use.
__forceinline__ void tma_prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// tma_load            into this block's shared memory, completing on its `barrier`
// tma_load_multicast  into that of every block of the cluster whose bit is set in `blocks`, at the same offset; in each block the
//                     barrier at the offset of `barrier` counts the full box's bytes
// tma_store           overwrites the box in global memory
// tma_reduce_add      adds to it, element by element, atomically, in the map's type

// 2 dimensions.
__forceinline__ void tma_load(void* shared, const TensorMap& map, u64* barrier, int x0, int x1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1)
               : "memory");
}
__forceinline__ void tma_load_multicast(void* shared, const TensorMap& map, u64* barrier, u16 blocks, int x0, int x1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5}], [%2], "
      "%3;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "h"(blocks), "r"(x0), "r"(x1)
      : "memory");
}
__forceinline__ void tma_store(const TensorMap& map, const void* shared, int x0, int x1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%1, {%2, %3}], [%0];" ::"r"(shared_address(shared)),
               "l"(&map), "r"(x0), "r"(x1)
               : "memory");
}
__forceinline__ void tma_reduce_add(const TensorMap& map, const void* shared, int x0, int x1) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%1, {%2, %3}], [%0];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x0), "r"(x1)
      : "memory");
}

// 3 dimensions.
__forceinline__ void tma_load(void* shared, const TensorMap& map, u64* barrier, int x0, int x1, int x2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2)
               : "memory");
}
__forceinline__ void tma_load_multicast(void* shared, const TensorMap& map, u64* barrier, u16 blocks, int x0, int x1, int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5, %6}], "
      "[%2], %3;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "h"(blocks), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
}
__forceinline__ void tma_store(const TensorMap& map, const void* shared, int x0, int x1, int x2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%1, {%2, %3, %4}], [%0];" ::"r"(shared_address(shared)),
               "l"(&map), "r"(x0), "r"(x1), "r"(x2)
               : "memory");
}
__forceinline__ void tma_reduce_add(const TensorMap& map, const void* shared, int x0, int x1, int x2) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%1, {%2, %3, %4}], [%0];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(x0), "r"(x1), "r"(x2)
               : "memory");
}

// 4 dimensions.
__forceinline__ void tma_load(void* shared, const TensorMap& map, u64* barrier, int x0, int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}
__forceinline__ void tma_load_multicast(void* shared, const TensorMap& map, u64* barrier, u16 blocks, int x0, int x1, int x2,
                                        int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5, %6, "
      "%7}], [%2], %3;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "h"(blocks), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}
__forceinline__ void tma_store(const TensorMap& map, const void* shared, int x0, int x1, int x2, int x3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(shared_address(shared)),
               "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}
__forceinline__ void tma_reduce_add(const TensorMap& map, const void* shared, int x0, int x1, int x2, int x3) {
  asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}

// 5 dimensions.
__forceinline__ void tma_load(void* shared, const TensorMap& map, u64* barrier, int x0, int x1, int x2, int x3, int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}
__forceinline__ void tma_load_multicast(void* shared, const TensorMap& map, u64* barrier, u16 blocks, int x0, int x1, int x2,
                                        int x3, int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5, %6, %7, "
      "%8}], [%2], %3;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "h"(blocks), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}
__forceinline__ void tma_store(const TensorMap& map, const void* shared, int x0, int x1, int x2, int x3, int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5, %6}], [%0];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}
__forceinline__ void tma_reduce_add(const TensorMap& map, const void* shared, int x0, int x1, int x2, int x3, int x4) {
  asm volatile("cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%1, {%2, %3, %4, %5, %6}], [%0];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
               : "memory");
}

// Runs of bytes: addresses and `bytes` are multiples of 16.
__forceinline__ void bulk_load(void* shared, const void* global, u32 bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__forceinline__ void bulk_store(void* global, const void* shared, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
// global[i] += shared[i], each addition atomic, in no fixed order against those of other copies.
__forceinline__ void bulk_reduce_add(float* global, const float* shared, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Closes the group of this thread's stores and additions since the last commit; an empty group counts.
__forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
__forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
