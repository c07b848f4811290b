// SPDX-License-Identifier: Apache-2.0
// The outputs of Winograd's tiles, while the sums of a few of them are in the first cache: to the
// output with shift, residual and ReLU, max-pooled by 2 x 2, where tiles are made of windows, or to
// scratch.
#pragma once
#include "emit.h"
#include "winograd_transforms.h"

namespace hetconv {
namespace HETCONV_NS {

// A band of one call: its images, first output, and size, in outputs and in tiles.
struct TileBlock {
  int64_t n;
  int images, oy, ox, nr, nc, tr, tc, tiles;
};
// Neighbouring tiles of a block, over the ends of rows and images.
struct TileChunk {
  int first, tiles;
};
// Where a tile of M x M outputs stands: image, row of tiles, and place in it.
template <int M> struct TileAt {
  int m, r, t;

  TileAt(const TileBlock& b, int tile)
      : m(tile / (b.tr * b.tc)), r(tile / b.tc % b.tr), t(tile % b.tc) {}
  void next(const TileBlock& b) {
    if (++t < b.tc) return;
    t = 0;
    if (++r < b.tr) return;
    r = 0;
    ++m;
  }
  // Of its first output.
  int row() const { return M * r; }
  int column() const { return M * t; }
  // How many outputs exist from the first one on.
  int high(const TileBlock& b) const { return b.nr - row(); }
  int wide(const TileBlock& b) const { return b.nc - column(); }
  // In [image][row][column], `ft` from pixel to pixel.
  ptrdiff_t scratch(const TileBlock& b, int ft) const {
    return ((ptrdiff_t(m) * b.nr + row()) * b.nc + column()) * ft;
  }
  ptrdiff_t place(const TileBlock& b, const View& v) const {
    return (b.n + m) * v.sn + (b.oy + row()) * v.sh + (b.ox + column()) * v.sw;
  }
};

// What the outputs of one vector of filters are made of. sums: of a chunk's first tile, `step` from
// tile to tile, `pitch` from position to position, or null; rest: [image][row][column] of the
// block, `ft` from pixel to pixel, or null.
template <class A> struct TileSums {
  const A* sums;
  ptrdiff_t step, pitch;
  A* rest;
  int ft;
};

// put(row, column, value) for each output of a tile that exists.
template <class A, int M, class Put>
HC_INLINE void each_output(const A* m, ptrdiff_t pitch, int high, int wide, const Put& put) {
  Vec<A> o[M * M];
  outputs_of<A, M>(m, pitch, o);
  HC_UNROLL for (int y = 0; y < M; ++y) if (y < high)
      HC_UNROLL for (int x = 0; x < M; ++x) if (x < wide) put(y, x, o[M * y + x]);
}

// Outputs of one vector of filters, to scratch; `add`: to what is there.
template <class A, int M>
static void scratch_tiles(const TileBlock& b, const TileChunk& c, const TileSums<A>& from,
                          bool add) {
  TileAt<M> at(b, c.first);
  const A* m = from.sums;
  for (int k = 0; k < c.tiles; ++k, m += from.step, at.next(b)) {
    A* o = from.rest + at.scratch(b, from.ft);
    each_output<A, M>(m, from.pitch, at.high(b), at.wide(b), [&](int y, int x, Vec<A> v) {
      A* to = o + (ptrdiff_t(y) * b.nc + x) * from.ft;
      store<A>(to, add ? v + load<A>(to) : v);
    });
  }
}

// The same with shift, residual and ReLU, to the output itself, from filter f0; ADD: the rest.
// End: Simple or SimpleNonTemporal.
template <class S, class A, int M, bool ADD, bool RES, class End>
static void output_tiles(const Problem& p, const TileBlock& b, const TileChunk& c,
                         const TileSums<A>& from, const End& e, int f0) {
  TileAt<M> at(b, c.first);
  const A* m = from.sums;
  S* ys = reinterpret_cast<S*>(p.y.data) + f0;
  const S* rs = RES ? reinterpret_cast<const S*>(p.res.data) + f0 : nullptr;
  for (int k = 0; k < c.tiles; ++k, m += from.step, at.next(b)) {
    S* y = ys + at.place(b, p.y);
    const S* res = RES ? rs + at.place(b, p.res) : nullptr;
    const A* rest = ADD ? from.rest + at.scratch(b, from.ft) : nullptr;
    each_output<A, M>(m, from.pitch, at.high(b), at.wide(b), [&](int dy, int dx, Vec<A> v) {
      if (ADD) v += load<A>(rest + (ptrdiff_t(dy) * b.nc + dx) * from.ft);
      End::put(e, v, y + dy * p.y.sh + dx * p.y.sw,
               RES ? res + dy * p.res.sh + dx * p.res.sw : nullptr);
    });
  }
}

// Whether tiles are made of the windows of the pooling.
static inline bool pools_tiles(const Problem& p) {
  const Pool& q = *p.pool;
  return q.KH == 2 && q.KW == 2 && q.sh == 2 && q.sw == 2 && q.pt == 0 && q.pl == 0 &&
         q.Ho == p.Ho / 2 && q.Wo == p.Wo / 2 && p.y.sc == 1;
}

// The pooled outputs. End: Simple, with f0 the first filter, or Lanes, with f0 = 0. A window of
// which a pixel is missing at an edge is none.
template <class S, class A, int M, class End>
static void pool_tiles(const Problem& p, const TileBlock& b, const TileChunk& c,
                       const TileSums<A>& from, const End& e, int f0) {
  TileAt<M> at(b, c.first);
  const A* m = from.sums;
  for (int k = 0; k < c.tiles; ++k, m += m ? from.step : 0, at.next(b)) {
    const A* rest = from.rest ? from.rest + at.scratch(b, from.ft) : nullptr;
    S* y = reinterpret_cast<S*>(p.y.data) + (b.n + at.m) * p.y.sn +
           ((b.oy + at.row()) / 2) * p.y.sh + ((b.ox + at.column()) / 2) * p.y.sw + f0;
    const S* res =
        p.res.data ? reinterpret_cast<const S*>(p.res.data) + at.place(b, p.res) + f0 : nullptr;
    Vec<A> o[M * M] = {};
    if (m) outputs_of<A, M>(m, from.pitch, o);
    HC_UNROLL for (int wy = 0; wy < M; wy += 2) HC_UNROLL for (int wx = 0; wx < M; wx += 2) {
      if (wy + 1 >= at.high(b) || wx + 1 >= at.wide(b)) continue;
      Vec<A> v[4];
      HC_UNROLL for (int i = 0; i < 4; ++i) {
        const int dy = wy + i / 2, dx = wx + i % 2;
        v[i] = o[M * dy + dx];
        if (rest) v[i] += load<A>(rest + (ptrdiff_t(dy) * b.nc + dx) * from.ft);
        v[i] = End::finished(e, v[i], res ? res + dy * p.res.sh + dx * p.res.sw : nullptr);
      }
      End::keep(e, larger<A>(larger<A>(v[0], v[1]), larger<A>(v[2], v[3])),
                y + wy / 2 * p.y.sh + wx / 2 * p.y.sw);
    }
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
