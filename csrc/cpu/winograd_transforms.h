// SPDX-License-Identifier: Apache-2.0
// The transforms of F(2x2, 3x3) on vectors of channels or filters: B^T d B of inputs, A^T m A of
// sums.
#pragma once
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

// Distance of positions: an odd number of lines, so that those of a tile are in different cache
// sets.
template <class A> HC_INLINE ptrdiff_t position_pitch(int tiles, int width) {
  constexpr ptrdiff_t line = VL<A>;
  return ((ptrdiff_t(tiles) * width + line - 1) / line | 1) * line;
}

// B^T d of a column of four inputs, `row` apart.
template <class A> HC_INLINE void transform_column(const A* d, ptrdiff_t row, Vec<A>* t) {
  const Vec<A> d0 = load<A>(d), d1 = load<A>(d + row), d2 = load<A>(d + 2 * row),
               d3 = load<A>(d + 3 * row);
  t[0] = d0 - d2;
  t[1] = d1 + d2;
  t[2] = d2 - d1;
  t[3] = d1 - d3;
}

// One row of tiles of one vector of channels: d is the band at the first tile's corner, v where its
// first position goes; tiles are `step` apart there.
template <class A>
static void transform_inputs(const A* d, ptrdiff_t row, ptrdiff_t pixel, int tiles, A* v,
                             ptrdiff_t step, ptrdiff_t pitch) {
  Vec<A> a[4], b[4], c[4], e[4];
  transform_column<A>(d, row, a);
  transform_column<A>(d + pixel, row, b);
  d += 2 * pixel;
  for (int k = 0; k < tiles; ++k, d += 2 * pixel, v += step) {
    transform_column<A>(d, row, c);
    transform_column<A>(d + pixel, row, e);
    HC_UNROLL for (int i = 0; i < 4; ++i) {
      A* to = v + 4 * i * pitch;
      store<A>(to, a[i] - c[i]);
      store<A>(to + pitch, b[i] + c[i]);
      store<A>(to + 2 * pitch, c[i] - b[i]);
      store<A>(to + 3 * pitch, b[i] - e[i]);
      a[i] = c[i];
      b[i] = e[i];
    }
  }
}

// A^T m A: the four outputs of a tile, o[2 * row + column].
template <class A> HC_INLINE void outputs_of(const A* m, ptrdiff_t pitch, Vec<A>* o) {
  Vec<A> top[4], bottom[4];
  HC_UNROLL for (int j = 0; j < 4; ++j) {
    const Vec<A> m0 = load<A>(m + j * pitch), m1 = load<A>(m + (4 + j) * pitch),
                 m2 = load<A>(m + (8 + j) * pitch), m3 = load<A>(m + (12 + j) * pitch);
    top[j] = m0 + m1 + m2;
    bottom[j] = m1 - m2 - m3;
  }
  o[0] = top[0] + top[1] + top[2];
  o[1] = top[1] - top[2] - top[3];
  o[2] = bottom[0] + bottom[1] + bottom[2];
  o[3] = bottom[1] - bottom[2] - bottom[3];
}

}  // namespace HETCONV_NS
}  // namespace hetconv
