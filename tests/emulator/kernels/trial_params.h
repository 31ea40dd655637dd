// What the emulator's own test kernels are given; each says what it makes of it.
#pragma once
#include <ptx/core.cuh>

struct TrialParams {
  const void* a;
  const void* b;
  void* out;
  int n;
  int fault;  // which mistake to make; 0: none
  TensorMap map_a, map_b, map_out;
};
