// SPDX-License-Identifier: Apache-2.0
// The transforms of F(2x2, 3x3), F(4x4, 3x3) and F(3x3, 4x4) on vectors of channels or filters:
// B^T d B of inputs, A^T m A of sums; and G g G^T of weights, in double. Equations:
// docs/backends/cpu.md.
#pragma once
#include "vec.h"
#include "winograd.h"

namespace hetconv {
namespace HETCONV_NS {

// Distance of positions: an odd number of lines, so that those of a tile are in different cache
// sets.
template <class T> HC_INLINE ptrdiff_t position_pitch(int tiles, int width) {
  constexpr ptrdiff_t line = VL<T>;
  return ((ptrdiff_t(tiles) * width + line - 1) / line | 1) * line;
}

// Along one axis. M: outputs of a tile.
template <int M> struct Transform;

// By the points 0, 1, -1 and infinity.
template <> struct Transform<2> {
  template <class A> HC_INLINE void inputs(const Vec<A>* d, Vec<A>* t) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
  template <class A> HC_INLINE void outputs(const Vec<A>* m, Vec<A>* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  HC_INLINE void weights(const double* g, double* t) {
    t[0] = g[0];
    t[1] = (g[0] + g[1] + g[2]) / 2;
    t[2] = (g[0] - g[1] + g[2]) / 2;
    t[3] = g[2];
  }
};

// By the points 0, a, -a, b, -b and infinity, a = 3/4 and b = 3/2: exact numbers whose powers stay
// near one, which errs less than half as much as 1 and 2 do. M outputs of 7 - M taps.
template <int M> struct SixPoints {
  static constexpr double a = 0.75, b = 1.5, a2 = a * a, b2 = b * b;

  template <class A> HC_INLINE void inputs(const Vec<A>* d, Vec<A>* t) {
    const Vec<A> a_even = d[4] - A(b2) * d[2], a_odd = d[3] - A(b2) * d[1],
                 b_even = d[4] - A(a2) * d[2], b_odd = d[3] - A(a2) * d[1];
    t[0] = A(a2 * b2) * d[0] + (d[4] - A(a2 + b2) * d[2]);
    t[1] = a_even + A(a) * a_odd;
    t[2] = a_even - A(a) * a_odd;
    t[3] = b_even + A(b) * b_odd;
    t[4] = b_even - A(b) * b_odd;
    t[5] = A(a2 * b2) * d[1] + (d[5] - A(a2 + b2) * d[3]);
  }
  template <class A> HC_INLINE void outputs(const Vec<A>* m, Vec<A>* y) {
    const Vec<A> a_even = m[1] + m[2], a_odd = m[1] - m[2], b_even = m[3] + m[4],
                 b_odd = m[3] - m[4];
    // With b = 2a only products by powers of two are added to others: however the compiler fuses
    // them, the bits are the same. Nor may it fuse a product with what is done to it next.
    y[0] = m[0] + a_even + b_even;
    y[1] = A(a) * (a_odd + A(2) * b_odd);
    y[2] = A(a2) * (a_even + A(4) * b_even);
    if constexpr (M == 4) y[3] = A(a2 * a) * (a_odd + A(8) * b_odd);
    HC_UNROLL for (int i = 1; i < M; ++i) keep_rounded<A>(y[i]);
    y[M - 1] += m[5];
  }
  HC_INLINE void weights(const double* g, double* t) {
    constexpr int R = taps(M);
    const double at_a = 2 * a2 * (a2 - b2), at_b = 2 * b2 * (b2 - a2);
    const auto value = [&](double x) {  // of the polynomial with these coefficients
      double sum = g[R - 1];
      HC_UNROLL for (int i = R - 2; i >= 0; --i) sum = sum * x + g[i];
      return sum;
    };
    t[0] = g[0] / (a2 * b2);
    t[1] = value(a) / at_a;
    t[2] = value(-a) / at_a;
    t[3] = value(b) / at_b;
    t[4] = value(-b) / at_b;
    t[5] = g[R - 1];
  }
};
template <> struct Transform<3> : SixPoints<3> {};
template <> struct Transform<4> : SixPoints<4> {};

// One row of tiles of one vector of channels: d is the band at the first tile's corner, v where its
// first position goes; tiles are `step` apart there. T: what they are kept as, computed in A.
template <class T, class A, int M>
static void transform_inputs(const T* d, ptrdiff_t row, ptrdiff_t pixel, int tiles, T* v,
                             ptrdiff_t step, ptrdiff_t pitch) {
  constexpr int N = side(M), shared = N - M;
  Vec<A> columns[N][N];  // the last `shared` are the next tile's first
  const auto column = [&](int x) {
    Vec<A> c[N];
    HC_UNROLL for (int y = 0; y < N; ++y) c[y] = read<T, A>(d + x * pixel + y * row);
    Transform<M>::template inputs<A>(c, columns[x]);
  };
  HC_UNROLL for (int x = 0; x < shared; ++x) column(x);
  for (int k = 0; k < tiles; ++k, d += M * pixel, v += step) {
    HC_UNROLL for (int x = shared; x < N; ++x) column(x);
    HC_UNROLL for (int y = 0; y < N; ++y) {
      Vec<A> r[N], t[N];
      HC_UNROLL for (int x = 0; x < N; ++x) r[x] = columns[x][y];
      Transform<M>::template inputs<A>(r, t);
      HC_UNROLL for (int x = 0; x < N; ++x) write<T, A>(v + (N * y + x) * pitch, t[x]);
      HC_UNROLL for (int x = 0; x < shared; ++x) columns[x][y] = r[M + x];
    }
  }
}

// The outputs of a tile, o[M * row + column].
template <class A, int M> HC_INLINE void outputs_of(const A* m, ptrdiff_t pitch, Vec<A>* o) {
  constexpr int N = side(M);
  Vec<A> columns[N][M];
  HC_UNROLL for (int x = 0; x < N; ++x) {
    Vec<A> c[N];
    HC_UNROLL for (int y = 0; y < N; ++y) c[y] = load<A>(m + (N * y + x) * pitch);
    Transform<M>::template outputs<A>(c, columns[x]);
  }
  HC_UNROLL for (int y = 0; y < M; ++y) {
    Vec<A> r[N];
    HC_UNROLL for (int x = 0; x < N; ++x) r[x] = columns[x][y];
    Transform<M>::template outputs<A>(r, o + M * y);
  }
}

// G g G^T, position by position: out is that of position 0, `pitch` apart. g: [row][column].
template <class A, int M> static void transform_weight(const double* g, A* out, ptrdiff_t pitch) {
  constexpr int N = side(M), R = taps(M);
  double columns[R][N];
  for (int x = 0; x < R; ++x) {
    double c[R];
    for (int y = 0; y < R; ++y) c[y] = g[R * y + x];
    Transform<M>::weights(c, columns[x]);
  }
  for (int y = 0; y < N; ++y) {
    double r[R], t[N];
    for (int x = 0; x < R; ++x) r[x] = columns[x][y];
    Transform<M>::weights(r, t);
    for (int x = 0; x < N; ++x) out[(N * y + x) * pitch] = A(t[x]);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
