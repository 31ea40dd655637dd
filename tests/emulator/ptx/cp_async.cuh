// Stands in for csrc/cuda/ptx/cp_async.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  emulator::copy_async(shared, global, 16, valid);
}
__forceinline__ void cp_async_4(void* shared, const void* global, bool valid = true) {
  emulator::copy_async(shared, global, 4, valid);
}
__forceinline__ void cp_async_commit() { emulator::copy_commit(); }
template <int kPending>
__forceinline__ void cp_async_wait() {
  emulator::copy_wait(kPending);
}
