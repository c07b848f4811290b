// SPDX-License-Identifier: Apache-2.0
// Bytes between pixels of channels and planes of pixels, 64 x 64 at a time.
//
// A plane has a channel of 64 pixels in a vector. Woven, 128-bit lane l holds the pixels
// 16 i + 4 l + k as its byte 4 i + k, i and k from 0 to 3: then quads of any four planes come out
// in order, two rounds of unpacking later.
#pragma once
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kTurned = 64;  // pixels and channels

HC_INLINE __m512i load_64(const uint8_t* p) { return _mm512_loadu_si512(p); }
HC_INLINE void store_64(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

// 16 vectors of 16 words: word i of vector k becomes word k of vector i.
HC_INLINE void transpose_words(__m512i* r) { transpose<float>(reinterpret_cast<Vec<float>*>(r)); }

// Planes of `pixels` pixels with `channels` bytes each, rounded up to 64 of both: x must be
// readable that far. Woven, or in the order of pixels.
template <bool woven>
static void planes_of_pixels(const uint8_t* x, int64_t pitch, int64_t pixels, int channels,
                             uint8_t* planes, int64_t plane) {
  // Bytes 4 i + j of each lane become its bytes 4 j + i.
  const __m512i weave = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  const __m512i straight = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  alignas(64) __m512i words[4][16];
  for (int64_t p = 0; p < pixels; p += kTurned)
    for (int c = 0; c < channels; c += kTurned) {
      for (int i = 0; i < 4; ++i) {
        __m512i r[16];
        const uint8_t* from = x + (p + 16 * i) * pitch + c;
        HC_UNROLL for (int k = 0; k < 16; ++k) r[k] = load_64(from + k * pitch);
        transpose_words(r);
        HC_UNROLL for (int k = 0; k < 16; ++k) words[i][k] = r[k];
      }
      const int quads = least(16, ceil_div(channels - c, kQuad));
      for (int k = 0; k < quads; ++k) {
        __m512i v[4];
        HC_UNROLL for (int i = 0; i < 4; ++i) v[i] = _mm512_shuffle_epi8(words[i][k], weave);
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]),
                      e = _mm512_unpackhi_epi32(v[0], v[1]), f = _mm512_unpackhi_epi32(v[2], v[3]);
        v[0] = _mm512_unpacklo_epi64(a, b);
        v[1] = _mm512_unpackhi_epi64(a, b);
        v[2] = _mm512_unpacklo_epi64(e, f);
        v[3] = _mm512_unpackhi_epi64(e, f);
        uint8_t* to = planes + (c + kQuad * k) * plane + p;
        HC_UNROLL for (int j = 0; j < kQuad; ++j)
            store_64(to + j * plane, woven ? v[j] : _mm512_permutexvar_epi32(straight, v[j]));
      }
    }
}

// Four planes side by side: vector i has the four bytes of 16 pixels from 16 i on where the planes
// are woven; otherwise lane l those of pixels 16 l + 4 i to 16 l + 4 i + 3.
HC_INLINE void quads_of_planes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* quads) {
  const __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b),
                more_low = _mm512_unpacklo_epi8(c, d), more_high = _mm512_unpackhi_epi8(c, d);
  quads[0] = _mm512_unpacklo_epi16(low, more_low);
  quads[1] = _mm512_unpackhi_epi16(low, more_low);
  quads[2] = _mm512_unpacklo_epi16(high, more_high);
  quads[3] = _mm512_unpackhi_epi16(high, more_high);
}

// Of woven planes, the quad of four channels for `pixels` pixels, rounded up to 64.
static inline void gather_quad(const uint8_t* planes, int64_t plane, const int* channels,
                               int64_t pixels, uint8_t* quads) {
  const uint8_t *a = planes + channels[0] * plane, *b = planes + channels[1] * plane,
                *c = planes + channels[2] * plane, *d = planes + channels[3] * plane;
  for (int64_t p = 0; p < pixels; p += kTurned, quads += kTurned * kQuad) {
    __m512i q[4];
    quads_of_planes(load_64(a + p), load_64(b + p), load_64(c + p), load_64(d + p), q);
    HC_UNROLL for (int i = 0; i < 4; ++i) store_64(quads + 64 * i, q[i]);
  }
}

// The way back: `rows` rows of `columns` pixels, `row` pixels apart in the planes, which are in
// order, to an image of `filters` bytes a pixel, `y_row` bytes a row.
static void pixels_of_planes(const uint8_t* planes, int64_t plane, int rows, int columns, int row,
                             int filters, uint8_t* y, int64_t y_row) {
  alignas(64) __m512i words[4][16];
  alignas(64) uint8_t rest[kTurned];
  const int64_t pixels = int64_t(rows - 1) * row + columns;
  int r = 0, column = 0;
  for (int64_t p = 0; p < pixels; p += kTurned) {
    uint8_t* to[kTurned];
    for (int k = 0; k < kTurned; ++k) {
      to[k] = r < rows && column < columns ? y + r * y_row + int64_t(column) * filters : nullptr;
      if (++column == row) {
        column = 0;
        ++r;
      }
    }
    for (int f = 0; f < filters; f += kTurned) {
      const int some = least(kTurned, filters - f), quads = ceil_div(some, kQuad);
      for (int k = 0; k < quads; ++k) {
        const uint8_t* from = planes + (f + kQuad * k) * plane + p;
        __m512i q[4];
        quads_of_planes(load_64(from), load_64(from + plane), load_64(from + 2 * plane),
                        load_64(from + 3 * plane), q);
        HC_UNROLL for (int i = 0; i < 4; ++i) words[i][k] = q[i];
      }
      for (int i = 0; i < 4; ++i) {
        __m512i v[16];
        HC_UNROLL for (int k = 0; k < 16; ++k) v[k] =
            k < quads ? words[i][k] : _mm512_setzero_si512();
        transpose_words(v);
        HC_UNROLL for (int k = 0; k < 16; ++k) {
          uint8_t* at = to[16 * (k / 4) + 4 * i + k % 4];
          if (!at) continue;
          if (some == kTurned) {
            store_64(at + f, v[k]);
          } else {
            store_64(rest, v[k]);
            memcpy(at + f, rest, size_t(some));
          }
        }
      }
    }
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
