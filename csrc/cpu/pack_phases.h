// SPDX-License-Identifier: Apache-2.0
// Packing of the four phases of an image: its even and odd rows and columns, as channels.
#pragma once
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

// What stride-2 outputs from (oy, ox) read, in `rows` x `cols` pixels of Cb channels, `row` from
// row to row of the band: (2 y + x) C + c is channel c of phase (y, x), then zeros. Beyond the
// image everything is zero. Writes a vector beyond the last pixel at most.
template <class S, class A>
static void pack_phases(const Problem& p, const S* x, int oy, int ox, int rows, int cols, int Cb,
                        int64_t row, A* band) {
  const int C = p.C, pair = 2 * C;
  const bool near = p.x.sc == 1 && p.x.sw == C && pair <= VL<A>;
  const int y0 = 2 * oy - p.pt, x0 = 2 * ox - p.pl;
  const auto inside = [](int at, int size) { return at >= 0 && at < size; };
  for (int r = 0; r < rows; ++r, band += row) {
    const S* lines[2];
    for (int k = 0; k < 2; ++k) {
      const int y = y0 + 2 * r + k;
      lines[k] = inside(y, p.H) ? x + y * p.x.sh : nullptr;
    }
    // Vectors overlap: what one writes too far, the next overwrites.
    const auto zeros = [&](A* to, int c) {
      for (; c < Cb; c += VL<A>) store<A>(to + c, splat<A>(A(0)));
    };
    const auto one = [&](int j) {
      A* to = band + int64_t(j) * Cb;
      const int at = x0 + 2 * j;
      if (at + 1 < 0 || at >= p.W) return zeros(to, 0);
      if (near && at >= 0 && at + 1 < p.W) {
        for (int k = 0; k < 2; ++k)
          store<A>(to + k * pair,
                   lines[k] ? read_n<S, A>(lines[k] + int64_t(at) * C, pair) : splat<A>(A(0)));
        return zeros(to, 2 * pair);
      }
      for (int c = 0; c < Cb; ++c) {
        const int k = c / pair, px = at + c % pair / C;
        const bool there = c < 2 * pair && lines[k] && inside(px, p.W);
        to[c] = there ? A(widen(lines[k][px * p.x.sw + c % C * p.x.sc])) : A(0);
      }
    };
    // Pixels from which a whole vector may be read.
    const int room = p.W - ceil_div(VL<A>, C) - x0, first = most(0, ceil_div(-x0, 2)),
              last = near && lines[0] && lines[1] && room >= 0 ? least(cols, room / 2 + 1) : 0;
    int j = 0;
    for (; j < least(first, cols); ++j) one(j);
    for (; j < last; ++j) {
      A* to = band + int64_t(j) * Cb;
      const int64_t at = int64_t(x0 + 2 * j) * C;
      store<A>(to, read<S, A>(lines[0] + at));
      store<A>(to + pair, read<S, A>(lines[1] + at));
      zeros(to, 2 * pair);
    }
    for (; j < cols; ++j) one(j);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
