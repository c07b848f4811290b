// SPDX-License-Identifier: Apache-2.0
// wgrad with pixels in vectors: NF filters x NC columns of dot products stay in registers over all
// pixels of a band.
#pragma once
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

// Columns by filters: NF * NC accumulators, NF gradient vectors, one input vector.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWgradColumns[9] = {0, 16, 12, 8, 6, 5, 4, 3, 3};
#else
constexpr int kWgradColumns[9] = {0, 8, 5, 3, 2, 2, 1, 0, 0};
#endif

template <class A>
using WgradKernel = void (*)(const A* dy, ptrdiff_t plane, const A* x, const int* off, int nvec,
                             A* sums);

// VL vectors to one vector of their sums, by halves: lanes and vectors are folded together.
template <class A, int H> HC_INLINE void fold(Vec<A>* r) {
  HC_UNROLL for (int i = 0; i < H; ++i) r[i] =
      low_halves<A, H>(r[i], r[i + H]) + high_halves<A, H>(r[i], r[i + H]);
  if constexpr (H > 1) fold<A, H / 2>(r);
}

// dy: NF planes; x + off[j]: column j; both over nvec whole vectors of pixels. Adds to sums
// [NC][NF].
template <class A, int NF, int NC>
static void wgrad_kernel(const A* dy, ptrdiff_t plane, const A* x, const int* off, int nvec,
                         A* sums) {
  constexpr int count = NF * NC, blocks = (count + VL<A> - 1) / VL<A>;
  Vec<A> acc[blocks * VL<A>];
  HC_UNROLL for (int i = 0; i < blocks * VL<A>; ++i) acc[i] = Vec<A>{};
  const A* column[NC];
  HC_UNROLL for (int j = 0; j < NC; ++j) column[j] = x + off[j];
  for (int v = 0; v < nvec; ++v) {
    Vec<A> g[NF];
    HC_UNROLL for (int i = 0; i < NF; ++i) g[i] = load<A>(dy + i * plane + v * VL<A>);
    HC_UNROLL for (int j = 0; j < NC; ++j) {
      const Vec<A> xv = load<A>(column[j] + v * VL<A>);
      HC_UNROLL for (int i = 0; i < NF; ++i) acc[j * NF + i] += g[i] * xv;
    }
  }
  HC_UNROLL for (int b = 0; b < blocks; ++b) {
    Vec<A>* r = acc + b * VL<A>;
    fold<A, VL<A> / 2>(r);
    A* out = sums + b * VL<A>;
    constexpr int tail = count % VL<A> == 0 ? VL<A> : count % VL<A>;
    if (b + 1 < blocks || tail == VL<A>)
      store<A>(out, load<A>(out) + r[0]);
    else
      store_n<A>(out, load_n<A>(out, tail) + r[0], tail);
  }
}

template <class A, int NF> static WgradKernel<A> wgrad_kernel_of(int nc) {
#define HC_ROW(m)                                                        \
  case m:                                                                \
    if constexpr (m <= kWgradColumns[NF]) return wgrad_kernel<A, NF, m>; \
    break;
  switch (nc) {
    HC_ROW(1)
    HC_ROW(2)
    HC_ROW(3)
    HC_ROW(4)
    HC_ROW(5)
    HC_ROW(6)
    HC_ROW(7)
    HC_ROW(8)
    HC_ROW(9)
    HC_ROW(10)
    HC_ROW(11)
    HC_ROW(12)
    HC_ROW(13)
    HC_ROW(14)
    HC_ROW(15)
    HC_ROW(16)
  }
#undef HC_ROW
  return nullptr;
}

template <class A> static WgradKernel<A> wgrad_kernel_for(int nf, int nc) {
  switch (nf) {
    case 1:
      return wgrad_kernel_of<A, 1>(nc);
    case 2:
      return wgrad_kernel_of<A, 2>(nc);
    case 3:
      return wgrad_kernel_of<A, 3>(nc);
    case 4:
      return wgrad_kernel_of<A, 4>(nc);
    case 5:
      return wgrad_kernel_of<A, 5>(nc);
    case 6:
      return wgrad_kernel_of<A, 6>(nc);
    case 7:
      return wgrad_kernel_of<A, 7>(nc);
    default:
      return wgrad_kernel_of<A, 8>(nc);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
