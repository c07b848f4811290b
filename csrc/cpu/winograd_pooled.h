// SPDX-License-Identifier: Apache-2.0
// Max-pooling, 2 x 2, of Winograd's outputs: the window is the tile, so it is taken in registers.
#pragma once
#include "emit.h"
#include "winograd_transforms.h"

namespace hetconv {
namespace HETCONV_NS {

// Whether the windows are the tiles.
static inline bool pools_tiles(const Problem& p) {
  const Pool& q = *p.pool;
  return q.KH == 2 && q.KW == 2 && q.sh == 2 && q.sw == 2 && q.pt == 0 && q.pl == 0 &&
         q.Ho == p.Ho / 2 && q.Wo == p.Wo / 2 && p.y.sc == 1;
}

// What the outputs of one vector of filters are made of. sums: of a tile, `step` from tile to tile,
// `pitch` from position to position, or null; rest: [image][row][column], `ft` from pixel to pixel,
// or null.
template <class A> struct TileSums {
  const A* sums;
  ptrdiff_t step, pitch;
  const A* rest;
  int ft;
};

// The pooled outputs of a block. End: Simple, with f0 the first filter, or Lanes, with f0 = 0. A
// window of which a pixel is missing at an edge is none.
template <class S, class A, class Block, class End>
static void pool_tiles(const Problem& p, const Block& b, TileSums<A> from, const End& e, int f0) {
  for (int i = 0; i < b.images * b.tr; ++i) {
    const int r = i % b.tr * 2;
    const int64_t n = b.n + i / b.tr;
    const A* rest =
        from.rest ? from.rest + (ptrdiff_t(i / b.tr) * b.nr + r) * b.nc * from.ft : nullptr;
    S* y = reinterpret_cast<S*>(p.y.data) + n * p.y.sn + (b.oy + r) / 2 * p.y.sh +
           b.ox / 2 * p.y.sw + f0;
    const S* res = p.res.data ? reinterpret_cast<const S*>(p.res.data) + n * p.res.sn +
                                    (b.oy + r) * p.res.sh + b.ox * p.res.sw + f0
                              : nullptr;
    for (int t = 0; t < b.tc; ++t, from.sums += from.sums ? from.step : 0) {
      if (b.nr - r < 2 || b.nc - 2 * t < 2) continue;
      Vec<A> o[4] = {};
      if (from.sums) outputs_of<A>(from.sums, from.pitch, o);
      HC_UNROLL for (int k = 0; k < 4; ++k) {
        const int dy = k / 2, x = 2 * t + k % 2;
        if (rest) o[k] += load<A>(rest + (ptrdiff_t(dy) * b.nc + x) * from.ft);
        o[k] = End::finished(e, o[k], res ? res + dy * p.res.sh + x * p.res.sw : nullptr);
      }
      End::keep(e, larger<A>(larger<A>(o[0], o[1]), larger<A>(o[2], o[3])), y + t * p.y.sw);
    }
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
