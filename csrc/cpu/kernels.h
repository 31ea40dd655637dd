// The contract between the doors (compiled once) and the kernels (compiled once per instruction set).
#pragma once
#include <cstdint>

#include "attention_params.h"

namespace fastattn {

struct Kernels {
  const char* isa;
  void (*attention_fwd)(const AttentionParams&);
  void (*attention_bwd)(const AttentionBwdParams&);
  double (*fma_flops)(bool bf16, int64_t iterations);  // runs a burst on this thread, returns the FLOPs it did
};

// The table in use: the best one, unless FASTATTN_CPU_ISA says otherwise.
const Kernels& kernels();

}  // namespace fastattn
