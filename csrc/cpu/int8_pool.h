// SPDX-License-Identifier: Apache-2.0
// Max-pooling of bytes.
#pragma once
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

// to[i] = the greater; bytes that are signed are flipped before and after.
HC_INLINE void greater_of(uint8_t* to, const uint8_t* from, int64_t n, uint8_t flip) {
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t a = to[i] ^ flip, b = from[i] ^ flip;
    to[i] = (a > b ? a : b) ^ flip;
  }
}

// The pooled rows [p0, p1) of an image of F channels, H x W; row `first` of it is at `rows`.
static inline void pool_bytes(const Pool& q, const uint8_t* rows, int first, int H, int W, int F,
                              bool is_signed, uint8_t* y, int p0, int p1) {
  const uint8_t flip = is_signed ? 0x80 : 0;
  for (int py = p0; py < p1; ++py) {
    const int y0 = most(0, py * q.sh - q.pt), y1 = least(H, py * q.sh - q.pt + q.KH);
    for (int px = 0; px < q.Wo; ++px) {
      const int x0 = most(0, px * q.sw - q.pl), x1 = least(W, px * q.sw - q.pl + q.KW);
      uint8_t* to = y + (int64_t(py) * q.Wo + px) * F;
      bool begun = false;
      for (int iy = y0; iy < y1; ++iy)
        for (int ix = x0; ix < x1; ++ix) {
          const uint8_t* from = rows + (int64_t(iy - first) * W + ix) * F;
          if (begun)
            greater_of(to, from, F, flip);
          else
            memcpy(to, from, size_t(F));
          begun = true;
        }
    }
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
