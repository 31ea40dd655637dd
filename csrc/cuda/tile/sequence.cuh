// One head of one sequence: its lengths and where its rows start, packed or not.
#pragma once
#include <ptx/core.cuh>

struct Sequence {
  int b, h, h_k;           // sequence, head of q, head of k and v
  int seqlen_q, seqlen_k;  // of this sequence
  int diagonal;            // the key that query 0 is aligned with
  int first_q, first_k;    // rows before it in packed tensors, else 0
};

template <class Params>
__forceinline__ Sequence sequence_of(const Params& p, int b, int h) {
  Sequence s;
  s.b = b;
  s.h = h;
  s.h_k = h / (p.nheads / p.nheads_k);
  s.first_q = s.first_k = 0;
  s.seqlen_q = p.seqlen_q;
  s.seqlen_k = p.seqlen_k;
  if (p.cu_seqlens_q != nullptr) {
    s.first_q = p.cu_seqlens_q[b];
    s.first_k = p.cu_seqlens_k[b];
    s.seqlen_q = p.cu_seqlens_q[b + 1] - s.first_q;
    s.seqlen_k = p.cu_seqlens_k[b + 1] - s.first_k;
  }
  s.diagonal = p.upper_left ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

// The row `row` of head `h` in a tensor with strides over batch, seqlen and head; `first` is first_q or first_k.
template <class T>
__forceinline__ T* row_of(void* base, const i64 (&stride)[3], int b, int first, int h, int row) {
  return static_cast<T*>(base) + b * stride[0] + (static_cast<i64>(first) + row) * stride[1] + h * stride[2];
}
template <class T>
__forceinline__ const T* row_of(const void* base, const i64 (&stride)[3], int b, int first, int h, int row) {
  return static_cast<const T*>(base) + b * stride[0] + (static_cast<i64>(first) + row) * stride[1] + h * stride[2];
}
