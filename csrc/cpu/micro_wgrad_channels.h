// SPDX-License-Identifier: Apache-2.0
// wgrad with channels in vectors: NF filters x NV windows of channels stay in registers over all
// pixels of a band.
#pragma once
#include "choose.h"
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

// Windows by filters: NF * NV accumulators, NV input vectors, one broadcast (or the reverse).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWindowFilters = 8;
constexpr int kWindows[9] = {0, 8, 8, 8, 6, 5, 4, 3, 3};
constexpr int kPermutedWindows[5] = {0, 8, 8, 6, 5};
#else
constexpr int kWindowFilters = 6;
constexpr int kWindows[9] = {0, 8, 6, 4, 3, 2, 2, 0, 0};
constexpr int kPermutedWindows[5] = {0, 6, 4, 3, 2};
#endif
constexpr int kPermuted = 4;

// The pixels of a band, in elements: rows of images of columns.
struct PixelSpan {
  int rows, images, cols;
  ptrdiff_t x_row, x_image, x_pixel, dy_row, dy_image;
};

template <class A>
using ChannelsKernel = void (*)(const A* dy, const A* x, const ptrdiff_t* off, const PixelSpan& s,
                                const A* perms, A* sums, bool first);

template <class A, bool permuted>
HC_INLINE Vec<A> filter_lanes(const A* g, int i, const typename Lane<A>::ivec* perm) {
  if constexpr (permuted)
    return permute_lanes<A>(load<A>(g), perm[i]);
  else
    return splat<A>(g[i]);
}

// What a lane holds is one number.
template <class A> struct OneProduct {
  HC_INLINE Vec<A> add(Vec<A> sum, Vec<A> a, Vec<A> b) { return sum + a * b; }
};

// dy: NF filters of a vector, VL apart from pixel to pixel; x + off[j]: window j. Permuted: each
// row takes the whole vector of filters, permuted. To sums [NF][NV], or added to what is there.
template <class A, int NF, int NV, bool permuted, class P>
static void channels_kernel(const A* dy, const A* x, const ptrdiff_t* off, const PixelSpan& s,
                            const A* perms, A* sums, bool first) {
  using I = typename Lane<A>::ivec;
  Vec<A> acc[NF][NV];
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] =
      Vec<A>{};
  I perm[permuted ? NF : 1];
  if constexpr (permuted) {
    HC_UNROLL for (int i = 0; i < NF; ++i) perm[i] = (I)load<A>(perms + i * VL<A>);
  }
  const A* window[NV];
  HC_UNROLL for (int j = 0; j < NV; ++j) window[j] = x + off[j];
  for (int r = 0; r < s.rows; ++r)
    for (int m = 0; m < s.images; ++m) {
      const A* g = dy + r * s.dy_row + m * s.dy_image;
      ptrdiff_t at = r * s.x_row + m * s.x_image;
      for (int c = 0; c < s.cols; ++c, g += VL<A>, at += s.x_pixel) {
        if constexpr (NV <= NF) {  // the shorter side waits in registers
          Vec<A> v[NV];
          HC_UNROLL for (int j = 0; j < NV; ++j) v[j] = load<A>(window[j] + at);
          HC_UNROLL for (int i = 0; i < NF; ++i) {
            const Vec<A> b = filter_lanes<A, permuted>(g, i, perm);
            HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = P::add(acc[i][j], b, v[j]);
          }
        } else {
          Vec<A> b[NF];
          HC_UNROLL for (int i = 0; i < NF; ++i) b[i] = filter_lanes<A, permuted>(g, i, perm);
          HC_UNROLL for (int j = 0; j < NV; ++j) {
            const Vec<A> v = load<A>(window[j] + at);
            HC_UNROLL for (int i = 0; i < NF; ++i) acc[i][j] = P::add(acc[i][j], b[i], v);
          }
        }
      }
    }
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NV; ++j) {
    A* o = sums + (i * NV + j) * VL<A>;
    store<A>(o, first ? acc[i][j] : load<A>(o) + acc[i][j]);
  }
}

template <class A, class P>
static ChannelsKernel<A> channels_kernel_for(bool permuted, int nf, int nv) {
  if (permuted && nf <= kPermuted)
    return choose<ChannelsKernel<A>, kPermuted>(nf, [nv](auto f) {
      constexpr int NF = f();
      return choose<ChannelsKernel<A>, kPermutedWindows[NF]>(
          nv, [](auto m) { return channels_kernel<A, NF, m(), true, P>; });
    });
  return choose<ChannelsKernel<A>, 8>(nf, [nv](auto f) {
    constexpr int NF = f();
    return choose<ChannelsKernel<A>, kWindows[NF]>(
        nv, [](auto m) { return channels_kernel<A, NF, m(), false, P>; });
  });
}

}  // namespace HETCONV_NS
}  // namespace hetconv
