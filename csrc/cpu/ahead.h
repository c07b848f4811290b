// SPDX-License-Identifier: Apache-2.0
// Software prefetch in small portions.
#pragma once
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

// Brings memory towards the core while a band is computed, a few lines at a time: the input of the
// next band, or the output that this one will write. Rows of `span` bytes, `pitch` apart, of which
// row i is number which[i] if that is given.
struct Ahead {
  char* base = nullptr;
  const int* which = nullptr;
  int64_t pitch = 0, span = 0, at = 0;
  int row = 0, rows = 0, lines = 0;  // lines: how many in one go
  // Spreads the rows over that many calls of step.
  void spread(int64_t calls) {
    lines = int(least<int64_t>(
        48, ceil_div<int64_t>(rows * ceil_div<int64_t>(span, 64), most<int64_t>(1, calls))));
  }
  template <bool WRITE> HC_INLINE void step(Ahead& a) {
    if (!a.base) return;
    for (int i = 0; i < a.lines && a.row < a.rows; ++i) {
      __builtin_prefetch(a.base + (a.which ? a.which[a.row] : a.row) * a.pitch + a.at, WRITE, 2);
      a.at += 64;
      if (a.at >= a.span) {
        a.at = 0;
        ++a.row;
      }
    }
  }
};

// The input pixels of a band of rows x cols outputs from (oy, ox): rows [y0, y1), columns [x0, x1).
struct Rectangle {
  int y0, y1, x0, x1;
  bool empty() const { return y1 <= y0 || x1 <= x0; }
};
HC_INLINE Rectangle input_pixels(const Problem& p, int oy, int ox, int rows, int cols) {
  // A band may be planned wider than the outputs that are left.
  const int64_t bottom = int64_t(oy + rows - 1) * p.sh - p.pt + (p.KH - 1) * p.dh + 1,
                right = int64_t(ox + cols - 1) * p.sw - p.pl + (p.KW - 1) * p.dw + 1;
  return {most(0, oy * p.sh - p.pt), int(least<int64_t>(p.H, bottom)), most(0, ox * p.sw - p.pl),
          int(least<int64_t>(p.W, right))};
}

}  // namespace HETCONV_NS
}  // namespace hetconv
