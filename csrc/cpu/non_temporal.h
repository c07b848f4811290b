// SPDX-License-Identifier: Apache-2.0
// Non-temporal stores. An output that the last-level cache cannot hold until somebody reads it is
// written past the caches: no line of it is fetched before it is overwritten, and nothing that is
// read again is evicted for it. Only where a vector is a whole cache line; parts of lines would be
// written one by one.
#pragma once
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

#if defined(__AVX512F__)
constexpr bool kNonTemporalStores = HETCONV_VECTOR_BYTES == 64;
template <class A> HC_INLINE void store_non_temporal(A* p, Vec<A> v) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
}
// Orders a thread's stores before what it writes next, as other threads see them.
HC_INLINE void non_temporal_fence() { _mm_sfence(); }
#else
constexpr bool kNonTemporalStores = false;
template <class A> HC_INLINE void store_non_temporal(A* p, Vec<A> v) { store<A>(p, v); }
HC_INLINE void non_temporal_fence() {}
#endif

// Whether a call's outputs are written so where a vector of filters starts at a multiple of VL.
template <class S, class A> static bool non_temporal(const Problem& p) {
  if (!kNonTemporalStores || sizeof(S) != sizeof(A) || p.pool || p.y.sc != 1) return false;
  const int64_t line = HETCONV_VECTOR_BYTES / int64_t(sizeof(S));
  return reinterpret_cast<uintptr_t>(p.y.data) % HETCONV_VECTOR_BYTES == 0 && p.y.sn % line == 0 &&
         p.y.sh % line == 0 && p.y.sw % line == 0 &&
         p.N * p.Ho * p.Wo * p.F * int64_t(sizeof(S)) > non_temporal_bytes();
}

}  // namespace HETCONV_NS
}  // namespace hetconv
