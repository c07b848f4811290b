// SPDX-License-Identifier: Apache-2.0
// Micro-kernel. Pixels in vectors: NF filters of one group x NP vectors of pixels stay in registers
// over all columns of the group.
#pragma once
#include <limits>
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
// Pixels beyond whole vectors that are computed with all filters of a tile in the lanes of one.
#if defined(__AVX512F__)
template <class A> constexpr int kMostOver = sizeof(A) == 4 ? 2 : 0;
#else
template <class A> constexpr int kMostOver = 0;
#endif

// How many pixels of so many are computed in that way: 0 where there are none beyond whole vectors,
// or so many that another vector of pixels costs less.
template <class A> static inline int pixels_over(int length) {
  const int over = length % VL<A>;
  return length > VL<A> && over <= kMostOver<A> ? over : 0;
}
// Vectors of pixels that are computed.
template <class A> static inline int pixel_vectors(int length) {
  return pixels_over<A>(length) ? length / VL<A> : ceil_div(length, VL<A>);
}

// What happens to sums that go to planes of the output while they are in registers: a shift, a
// residual, a ReLU.
template <class A> struct PlanesEnd {
  const A* shift;  // by filter, or null
  const A* res;    // the tile's first pixel of filter 0, or null
  ptrdiff_t res_plane;
  bool relu;
};

template <class A>
using PixelsKernel = void (*)(const A* a, const int* off, int step, int ncols, const A* w, A* o,
                              ptrdiff_t os, const int* rows, bool add, const PlanesEnd<A>* end);

// Brings near what the sums are added to, and where they go, while they are computed.
template <class A, int NF, int NP>
HC_INLINE void fetch_planes(const A* o, ptrdiff_t os, const int* rows, const PlanesEnd<A>& e) {
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j) {
    __builtin_prefetch(o + rows[i] * os + j * VL<A>, 1, 3);
    if (e.res) __builtin_prefetch(e.res + rows[i] * e.res_plane + j * VL<A>, 0, 3);
  }
}

template <class A> HC_INLINE A floor_of(const PlanesEnd<A>& e) {
  return e.relu ? A(0) : -std::numeric_limits<A>::infinity();
}

template <class A, int NF, int NP>
HC_INLINE void finish_planes(Vec<A> (&acc)[NF][NP], const int* rows, const PlanesEnd<A>& e) {
  const Vec<A> floor = splat<A>(floor_of(e));
  HC_UNROLL for (int i = 0; i < NF; ++i) {
    if (e.shift) {
      const Vec<A> shift = splat<A>(e.shift[rows[i]]);
      HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] += shift;
    }
    if (e.res) {
      const A* res = e.res + rows[i] * e.res_plane;
      HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] += load<A>(res + j * VL<A>);
    }
    // Written so that NaN stays NaN.
    HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = floor > acc[i][j] ? floor : acc[i][j];
  }
}

// One pixel of each filter, as finish_planes.
template <class A, int NF>
HC_INLINE void finish_pixel(A (&sums)[NF], ptrdiff_t at, const int* rows, const PlanesEnd<A>& e) {
  const A floor = floor_of(e);
  for (int i = 0; i < NF; ++i) {
    if (e.shift) sums[i] += e.shift[rows[i]];
    if (e.res) sums[i] += e.res[rows[i] * e.res_plane + at];
    sums[i] = floor > sums[i] ? floor : sums[i];
  }
}

// Weights are read in order, once for each tile of outputs, and the processor's own prefetch stops
// at the end of a page: bytes ahead are asked for by hand.
constexpr size_t kWeightsAhead = 2048;

// a: first pixel, off: planar offset of each column, `step` entries apart, w: [ncols][NF], o: rows
// of NP vectors and OVER pixels, os apart, of which rows[i] is that of filter i. add: to what is
// there. end: what happens to the sums first, or null.
template <class A, int NF, int NP, int OVER>
static void pixels_kernel(const A* a, const int* off, int step, int ncols, const A* w, A* o,
                          ptrdiff_t os, const int* rows, bool add, const PlanesEnd<A>* end) {
  constexpr int kOver = OVER > 0 ? OVER : 1;
  Vec<A> acc[NF][NP], over[kOver];  // over: lane i is filter i
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] =
      Vec<A>{};
  HC_UNROLL for (int k = 0; k < OVER; ++k) over[k] = Vec<A>{};
  if (add) {
    HC_UNROLL for (int i = 0; i < NF; ++i) {
      const A* row = o + rows[i] * os;
      HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = load<A>(row + j * VL<A>);
      HC_UNROLL for (int k = 0; k < OVER; ++k) over[k][i] = row[NP * VL<A> + k];
    }
  }
  if (end) fetch_planes<A, NF, NP>(o, os, rows, *end);
  for (int s = 0; s < ncols; ++s, off += step) {
    const A* p = a + *off;
    Vec<A> x[NP];
    HC_UNROLL for (int j = 0; j < NP; ++j) x[j] = load<A>(p + j * VL<A>);
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kWeightsAhead, 0, 3);
    HC_UNROLL for (int i = 0; i < NF; ++i) {
      const Vec<A> b = splat<A>(w[i]);
      HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] += b * x[j];
    }
    if constexpr (OVER > 0) {
      const Vec<A> filters = load_n<A>(w, NF);
      HC_UNROLL for (int k = 0; k < OVER; ++k) over[k] += filters * splat<A>(p[NP * VL<A> + k]);
    }
    w += NF;
  }
  if (end) finish_planes(acc, rows, *end);
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j)
      store<A>(o + rows[i] * os + j * VL<A>, acc[i][j]);
  HC_UNROLL for (int k = 0; k < OVER; ++k) {
    A sums[NF];
    store_n<A>(sums, over[k], NF);
    if (end) finish_pixel<A, NF>(sums, NP * VL<A> + k, rows, *end);
    for (int i = 0; i < NF; ++i) o[rows[i] * os + NP * VL<A> + k] = sums[i];
  }
}

template <class A, int OVER> static PixelsKernel<A> pixels_kernel_of(int nf, int np) {
  return choose<PixelsKernel<A>, 8>(nf, [np](auto f) {
    constexpr int NF = f();
    return choose<PixelsKernel<A>, kPixelVectors[NF]>(
        np, [](auto m) { return pixels_kernel<A, NF, m(), OVER>; });
  });
}
template <class A> static PixelsKernel<A> pixels_kernel_for(int nf, int np, int over) {
  if constexpr (kMostOver<A> > 0) {
    if (over > 0)
      return choose<PixelsKernel<A>, kMostOver<A>>(
          over, [nf, np](auto k) { return pixels_kernel_of<A, k()>(nf, np); });
  }
  return pixels_kernel_of<A, 0>(nf, np);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
