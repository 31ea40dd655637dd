// The contract between the doors (compiled once) and the kernels (compiled once per instruction set).
#pragma once
#include <cstdint>

#include "attention_params.h"
#include "norm_params.h"
#include "rope_params.h"

namespace fastattn {

struct Kernels {
  const char* isa;
  void (*attention_fwd)(const AttentionParams&);
  void (*attention_bwd)(const AttentionBwdParams&);
  bool (*attention_is_decode)(const AttentionParams&);  // does attention_decode take this call?
  void (*attention_decode)(const AttentionParams&);
  void (*attention_weights)(const AttentionParams&);
  void (*norm_fwd)(const NormParams&);
  void (*norm_bwd)(const NormBwdParams&);
  void (*rope)(const RopeParams&);
  double (*fma_flops)(bool bf16, int64_t iterations);  // runs a burst on this thread, returns the FLOPs it did
  // Copies whole lines; `to` is aligned to 64 bytes. ahead: how far ahead of the load to fetch, 0 leaves it to the hardware.
  void (*copy_bytes)(char* to, const char* from, int64_t bytes, bool around_cache, int64_t ahead);
};

// The table in use: the best one, unless FASTATTN_CPU_ISA says otherwise.
const Kernels& kernels();

}  // namespace fastattn
