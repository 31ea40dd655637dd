// Who sees whom by position: query m sees keys n in [m + diagonal - left, m + diagonal + right], within both lengths.
#pragma once
#include <ptx/core.cuh>
#include <tile/sequence.cuh>

// Keys [lo, hi) hold all that a block of queries sees; every query sees all of [whole_lo, whole_hi), which may be empty.
// The same the other way round: the queries that see a block of keys.
struct Range {
  int lo, hi, whole_lo, whole_hi;
  // Is the tile [n0, n0 + size) seen as a whole?
  __forceinline__ bool whole(int n0, int size) const { return n0 >= whole_lo && n0 + size <= whole_hi; }
};

// Of queries [m0, m1); lo is a multiple of kBlock.
template <int kBlock, class Params>
__forceinline__ Range key_range(const Params& p, const Sequence& s, int m0, int m1) {
  Range r;
  r.lo = max(0, m0 + s.diagonal - p.left) / kBlock * kBlock;
  r.hi = min(s.seqlen_k, m1 + s.diagonal + p.right);
  r.whole_lo = max(0, m1 - 1 + s.diagonal - p.left);
  r.whole_hi = min(s.seqlen_k, m0 + s.diagonal + p.right + 1);
  return r;
}

// Of keys [n0, n1); lo is a multiple of kBlock.
template <int kBlock, class Params>
__forceinline__ Range query_range(const Params& p, const Sequence& s, int n0, int n1) {
  Range r;
  r.lo = max(0, n0 - s.diagonal - p.right) / kBlock * kBlock;
  r.hi = min(s.seqlen_q, n1 - s.diagonal + p.left);
  r.whole_lo = max(0, n1 - 1 - s.diagonal - p.right);
  r.whole_hi = min(s.seqlen_q, n0 - s.diagonal + p.left + 1);
  return r;
}

// Do all of kRows queries see all of kKeys keys, as far as the band goes? offset: the first key less the one that the first
// query is aligned with. What Range::whole says with fewer registers.
template <int kRows, int kKeys, class Params>
__forceinline__ bool in_band(const Params& p, int offset) {
  return offset + kKeys - 1 <= p.right && offset - kRows + 1 >= -p.left;
}

// The keys [first, last) that query m sees, counted from key n0 on; none for a query that does not exist.
struct Span {
  int first, last;
  __forceinline__ bool holds(int n) const { return n >= first && n < last; }
};
template <class Params>
__forceinline__ Span span_of(const Params& p, const Sequence& s, int m, int n0) {
  int aligned = m + s.diagonal - n0;
  return {max(-n0, aligned - p.left), m < s.seqlen_q ? min(s.seqlen_k - n0, aligned + p.right + 1) : -n0};
}
