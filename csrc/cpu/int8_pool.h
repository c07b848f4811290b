// SPDX-License-Identifier: Apache-2.0
// Max-pooling of bytes.
#pragma once
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

template <class B> struct SomeBytes;
template <> struct SomeBytes<uint8_t> {
  typedef uint8_t few __attribute__((vector_size(16)));
  typedef uint8_t many __attribute__((vector_size(HETCONV_VECTOR_BYTES)));
};
template <> struct SomeBytes<int8_t> {
  typedef int8_t few __attribute__((vector_size(16)));
  typedef int8_t many __attribute__((vector_size(HETCONV_VECTOR_BYTES)));
};

template <class V> HC_INLINE V some_bytes(const uint8_t* at) {
  V v;
  memcpy(&v, at, sizeof v);
  return v;
}

// The greatest of each byte in a window: `h` x `w` pixels from `from` on.
template <class V>
HC_INLINE V greatest_of(const uint8_t* from, int64_t row, int64_t pixel, int h, int w) {
  V best = some_bytes<V>(from);
  for (int y = 0; y < h; ++y)
    for (int x = 0; x < w; ++x) {
      const V v = some_bytes<V>(from + y * row + x * pixel);
      best = v > best ? v : best;
    }
  return best;
}

template <class B>
static void pool_bytes_as(const Pool& q, const uint8_t* rows, int first, int H, int W, int F,
                          uint8_t* y, int p0, int p1) {
  using Few = typename SomeBytes<B>::few;
  using Many = typename SomeBytes<B>::many;
  constexpr int size = sizeof(Many), count = 64 / size;
  const int64_t row = int64_t(W) * F;
  for (int py = p0; py < p1; ++py) {
    const int y0 = most(0, py * q.sh - q.pt), y1 = least(H, py * q.sh - q.pt + q.KH);
    for (int px = 0; px < q.Wo; ++px) {
      const int x0 = most(0, px * q.sw - q.pl), x1 = least(W, px * q.sw - q.pl + q.KW);
      uint8_t* to = y + (int64_t(py) * q.Wo + px) * F;
      const uint8_t* from = rows + (y0 - first) * row + int64_t(x0) * F;
      const int h = y1 - y0, w = x1 - x0;
      int f = 0;
      for (; f + 64 <= F; f += 64) {
        Many best[count];
        HC_UNROLL for (int k = 0; k < count; ++k) best[k] = some_bytes<Many>(from + f + size * k);
        for (int iy = 0; iy < h; ++iy)
          for (int ix = 0; ix < w; ++ix) {
            const uint8_t* at = from + iy * row + int64_t(ix) * F + f;
            HC_UNROLL for (int k = 0; k < count; ++k) {
              const Many v = some_bytes<Many>(at + size * k);
              best[k] = v > best[k] ? v : best[k];
            }
          }
        memcpy(to + f, best, sizeof best);
      }
      for (; f + 16 <= F; f += 16) {
        const Few best = greatest_of<Few>(from + f, row, F, h, w);
        memcpy(to + f, &best, sizeof best);
      }
      for (; f < F; ++f) {
        const B best = greatest_of<B>(from + f, row, F, h, w);
        memcpy(to + f, &best, sizeof best);
      }
    }
  }
}

// The pooled rows [p0, p1) of an image of F channels, H x W; row `first` of it is at `rows`.
static inline void pool_bytes(const Pool& q, const uint8_t* rows, int first, int H, int W, int F,
                              bool is_signed, uint8_t* y, int p0, int p1) {
  if (is_signed)
    pool_bytes_as<int8_t>(q, rows, first, H, W, F, y, p0, p1);
  else
    pool_bytes_as<uint8_t>(q, rows, first, H, W, F, y, p0, p1);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
