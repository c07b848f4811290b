// SPDX-License-Identifier: Apache-2.0
// Packing of one band by vectors of channels, [vector][entry][VL] with the entries of a planar
// band, and the ways between the two: whole blocks are transposed, however short the rows are.
#pragma once
#include "pack.h"

namespace hetconv {
namespace HETCONV_NS {

// `run` neighbouring channels of n pixels, px apart.
template <class S, class A>
static void pack_vector_row(Source<S> x, int64_t px, int run, int n, A* d) {
  if (run == VL<A>) {
    for (int j = 0; j < n; ++j, x += px, d += VL<A>) store<A>(d, read<S, A>(x));
  } else {
    for (int j = 0; j < n; ++j, x += px, d += VL<A>) store<A>(d, read_n<S, A>(x, run));
  }
}

// From a tensor with channels innermost: vector v holds the runs[v] neighbours from channel
// channels[v * VL], its other lanes zeros.
template <class S, class A>
static void pack_vectors(const Problem& p, Images<S> x, const int* channels, const int* runs,
                         int nvec, const Axis& ya, const Axis& xa, const Planar& g, int64_t n0,
                         int images, int oy, int ox, int rows, int cols, A* band) {
  const ptrdiff_t vector = g.plane * VL<A>;
  for (int u = 0; u < xa.pieces; ++u) {
    const Piece& xp = xa.piece[u];
    const int first = ox * p.sw - p.pl + xp.rel, len = least(piece_length(xa, xp, cols), g.pitch);
    const int64_t px = int64_t(xp.istride) * p.x.sw;
    int lo, hi;
    inside(first, xp.istride, len, p.W, &lo, &hi);
    for (int q = 0; q < ya.pieces; ++q) {
      const Piece& yp = ya.piece[q];
      const int n = piece_length(ya, yp, rows);
      for (int i = 0; i < n; ++i) {
        const int iy = oy * p.sh - p.pt + yp.rel + i * yp.istride;
        const bool blank = iy < 0 || iy >= p.H || hi <= lo;
        for (int m = 0; m < g.images; ++m) {
          A* d = band + (u * g.piece + (yp.e0 + i) * g.row + int64_t(m) * g.pitch) * VL<A>;
          const Source<S> src = image_of(x, n0 + m, p.x.sn) + int64_t(iy) * p.x.sh +
                                int64_t(first + lo * xp.istride) * p.x.sw;
          for (int v = 0; v < nvec; ++v, d += vector) {
            if (blank || m >= images) {
              zero_fill(d, int64_t(g.pitch) * VL<A>);
              continue;
            }
            zero_fill(d, int64_t(lo) * VL<A>);
            pack_vector_row<S, A>(src + channels[v * VL<A>], px, runs[v], hi - lo, d + lo * VL<A>);
            zero_fill(d + hi * VL<A>, int64_t(g.pitch - hi) * VL<A>);
          }
        }
      }
      // Taps right of the last row read the zeros that would start the next one.
      for (int v = 0; v < nvec && g.spill > 0; ++v)
        zero_fill(band + v * vector + (u * g.piece + (yp.e0 + n) * g.row) * VL<A>,
                  int64_t(g.spill) * VL<A>);
    }
  }
}

// A planar band of the channels order[0 .. count), of which channel c has plane plane_of[c], -1 for
// none. `scratch` has room for one vector of channels.
template <class S, class A>
static void pack_planes(const Problem& p, Images<S> x, const int* order, int count,
                        const int* plane_of, const Axis& ya, const Axis& xa, const Planar& g,
                        int64_t n0, int images, int oy, int ox, int rows, int cols, A* scratch,
                        A* band) {
  if (p.x.sc != 1)
    return pack_planar<S, A>(p, x, Channels{order, count}, ya, xa, g, n0, images, oy, ox, rows,
                             cols, band);
  for (int c = 0; c < p.C; c += VL<A>) {
    const int run = least(VL<A>, p.C - c);
    bool any = false;
    for (int l = 0; l < run; ++l) any |= plane_of[c + l] >= 0;
    if (!any) continue;
    pack_vectors<S, A>(p, x, &c, &run, 1, ya, xa, g, n0, images, oy, ox, rows, cols, scratch);
    for (int64_t e = 0; e < g.plane; e += VL<A>) {
      Vec<A> r[VL<A>];
      HC_UNROLL for (int j = 0; j < VL<A>; ++j) r[j] = load<A>(scratch + (e + j) * VL<A>);
      transpose<A>(r);
      for (int l = 0; l < run; ++l)
        if (plane_of[c + l] >= 0) store<A>(band + plane_of[c + l] * g.plane + e, r[l]);
    }
  }
}

// From a planar band: lane l of vector v is plane planes[v * VL + l], zero where that is negative.
template <class A>
static void transpose_planes(const A* from, const int* planes, int nvec, int64_t plane, A* band) {
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
