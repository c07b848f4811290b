// SPDX-License-Identifier: Apache-2.0
// wgrad with pixels in vectors: NF filters x NC columns of dot products stay in registers over all
// pixels of a band.
#pragma once
#include "choose.h"
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

template <class A> static WgradKernel<A> wgrad_kernel_for(int nf, int nc) {
  return choose<WgradKernel<A>, 8>(nf, [nc](auto f) {
    constexpr int NF = f();
    return choose<WgradKernel<A>, kWgradColumns[NF]>(
        nc, [](auto m) { return wgrad_kernel<A, NF, m()>; });
  });
}

}  // namespace HETCONV_NS
}  // namespace hetconv
