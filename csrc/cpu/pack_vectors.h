// SPDX-License-Identifier: Apache-2.0
// Packing of one band by vectors of channels: [vector][entry][VL], the entries as in a planar band.
#pragma once
#include "pack.h"

namespace hetconv {
namespace HETCONV_NS {

// From a tensor with channels innermost. Vector v is the runs[v] neighbours from channel
// channels[v * VL]; its other lanes are zero. g.plane counts entries.
template <class S, class A>
static void pack_vectors(const Problem& p, const S* x, const int* channels, const int* runs,
                         int nvec, const Axis& ya, const Axis& xa, const Planar& g, int64_t n0,
                         int images, int oy, int ox, int rows, int cols, A* band) {
  const ptrdiff_t vector = g.plane * VL<A>;
  for (int u = 0; u < xa.pieces; ++u) {
    const Piece& xp = xa.piece[u];
    const int first = ox * p.sw - p.pl + xp.rel, len = piece_length(xa, xp, cols);
    const int64_t px = int64_t(xp.istride) * p.x.sw;
    int lo, hi;
    inside(first, xp.istride, len, p.W, &lo, &hi);
    for (int q = 0; q < ya.pieces; ++q) {
      const Piece& yp = ya.piece[q];
      for (int i = 0, n = piece_length(ya, yp, rows); i < n; ++i) {
        const int iy = oy * p.sh - p.pt + yp.rel + i * yp.istride;
        const bool blank = iy < 0 || iy >= p.H || hi <= lo;
        for (int m = 0; m < images; ++m) {
          A* d = band + (u * g.piece + (yp.e0 + i) * g.row + int64_t(m) * g.pitch) * VL<A>;
          if (blank) {
            for (int v = 0; v < nvec; ++v) zero_fill(d + v * vector, int64_t(len) * VL<A>);
            continue;
          }
          const S* src = x + (n0 + m) * p.x.sn + int64_t(iy) * p.x.sh +
                         int64_t(first + lo * xp.istride) * p.x.sw;
          for (int v = 0; v < nvec; ++v) {
            zero_fill(d + v * vector, int64_t(lo) * VL<A>);
            zero_fill(d + v * vector + int64_t(hi) * VL<A>, int64_t(len - hi) * VL<A>);
          }
          for (int j = lo; j < hi; ++j, src += px)
            for (int v = 0; v < nvec; ++v)
              store<A>(d + v * vector + int64_t(j) * VL<A>,
                       runs[v] == VL<A> ? read<S, A>(src + channels[v * VL<A>])
                                        : read_n<S, A>(src + channels[v * VL<A>], runs[v]));
        }
      }
    }
  }
}

// From a planar band: lane l of vector v is plane planes[v * VL + l], zero where that is negative.
template <class A>
static void turn_planes(const A* from, const int* planes, int nvec, int64_t plane, A* band) {
  for (int v = 0; v < nvec; ++v, planes += VL<A>, band += plane * VL<A>)
    for (int64_t e = 0; e < plane; e += VL<A>) {
      Vec<A> r[VL<A>];
      HC_UNROLL for (int l = 0; l < VL<A>; ++l) r[l] =
          planes[l] >= 0 ? load<A>(from + planes[l] * plane + e) : Vec<A>{};
      transpose<A>(r);
      HC_UNROLL for (int j = 0; j < VL<A>; ++j) store<A>(band + (e + j) * VL<A>, r[j]);
    }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
