// A sink adds one logit per head to the denominator: a key without a value.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <tile/softmax.cuh>

// The sink of head h in units of log 2, -inf without sinks. T is the type of q.
template <class T, class Params>
__forceinline__ float sink_of(const Params& p, int h) {
  if (p.sinks == nullptr) return -infinity();
  return kLog2e * (p.sinks_float ? static_cast<const float*>(p.sinks)[h] : to_float(static_cast<const T*>(p.sinks)[h]));
}
