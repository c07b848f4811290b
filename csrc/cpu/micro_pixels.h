// SPDX-License-Identifier: Apache-2.0
// Micro-kernel. Pixels in vectors: NF filters of one group x NP vectors of pixels stay in registers
// over all columns of the group.
#pragma once
#include "choose.h"
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxPixelFilters = 8;
constexpr int kPixelVectors[9] = {0, 8, 8, 7, 6,
                                  5, 4, 3, 3};  // NP by NF: NF * NP + NP + 1 registers
constexpr int kMostPixelVectors = 8;
#else
constexpr int kMaxPixelFilters = 6;
constexpr int kPixelVectors[9] = {0, 6, 4, 3, 2, 2, 2, 0, 0};
constexpr int kMostPixelVectors = 6;
#endif

template <class A>
using PixelsKernel = void (*)(const A* a, const int* off, int step, int ncols, const A* w, A* o,
                              ptrdiff_t os, const int* rows, bool add);

// a: first pixel, off: planar offset of each column, `step` entries apart, w: [ncols][NF], o: rows
// of NP vectors, os apart, of which rows[i] is that of filter i. add: to what is there.
template <class A, int NF, int NP>
static void pixels_kernel(const A* a, const int* off, int step, int ncols, const A* w, A* o,
                          ptrdiff_t os, const int* rows, bool add) {
  Vec<A> acc[NF][NP];
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] =
      Vec<A>{};
  if (add) {
    HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] =
        load<A>(o + rows[i] * os + j * VL<A>);
  }
  for (int s = 0; s < ncols; ++s, off += step) {
    const A* p = a + *off;
    Vec<A> x[NP];
    HC_UNROLL for (int j = 0; j < NP; ++j) x[j] = load<A>(p + j * VL<A>);
    HC_UNROLL for (int i = 0; i < NF; ++i) {
      const Vec<A> b = splat<A>(w[i]);
      HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] += b * x[j];
    }
    w += NF;
  }
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j)
      store<A>(o + rows[i] * os + j * VL<A>, acc[i][j]);
}

template <class A> static PixelsKernel<A> pixels_kernel_for(int nf, int np) {
  return choose<PixelsKernel<A>, 8>(nf, [np](auto f) {
    constexpr int NF = f();
    return choose<PixelsKernel<A>, kPixelVectors[NF]>(
        np, [](auto m) { return pixels_kernel<A, NF, m()>; });
  });
}

}  // namespace HETCONV_NS
}  // namespace hetconv
