// SPDX-License-Identifier: Apache-2.0
// bfloat16 between pixels of channels and planes of pixels, 32 x 32 at a time: a plane has a
// channel of 32 pixels in a vector, and two planes make the pairs of 2 x 16 pixels.
#pragma once
#include "micro_pairs.h"
#include "pack_pairs.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kPairTurned = 32;  // pixels and channels

// Both halves of lane l hold l.
HC_INLINE __m512i lane_numbers() {
  return _mm512_setr_epi32(0x00000, 0x10001, 0x20002, 0x30003, 0x40004, 0x50005, 0x60006, 0x70007,
                           0x80008, 0x90009, 0xa000a, 0xb000b, 0xc000c, 0xd000d, 0xe000e, 0xf000f);
}
// Numbers of elements of two vectors, the second's from 32 on, as permutex2var takes them. Every
// other one, from `first` on.
HC_INLINE __m512i pick_alternate(int first) {
  // The halves of lane l are elements 4 l + first and 4 l + 2 + first.
  const __m512i fours = _mm512_slli_epi16(lane_numbers(), 2);
  return _mm512_add_epi16(fours, _mm512_set1_epi32((first + 2) << 16 | first));
}
// Of both vectors, elements first + l in the halves of lane l.
HC_INLINE __m512i pick_interleaved(int first) {
  return _mm512_add_epi16(lane_numbers(), _mm512_set1_epi32((first + 32) << 16 | first));
}
HC_INLINE void transpose_pairs(__m512i* r) { transpose<float>(reinterpret_cast<Vec<float>*>(r)); }

// Planes of `pixels` pixels of `channels` channels, rounded up to 32 of both: x must be readable
// that far.
static void planes_of_pairs(const bf16* x, int64_t pitch, int64_t pixels, int channels,
                            bf16* planes, int64_t plane) {
  const __m512i lower = pick_alternate(0), upper = pick_alternate(1);
  alignas(64) __m512i words[2][16];
  for (int64_t p = 0; p < pixels; p += kPairTurned)
    for (int c = 0; c < channels; c += kPairTurned) {
      for (int i = 0; i < 2; ++i) {
        __m512i r[16];
        const bf16* from = x + (p + 16 * i) * pitch + c;
        HC_UNROLL for (int k = 0; k < 16; ++k) r[k] = _mm512_loadu_si512(from + k * pitch);
        transpose_pairs(r);
        HC_UNROLL for (int k = 0; k < 16; ++k) words[i][k] = r[k];
      }
      const int pairs = least(16, ceil_div(channels - c, 2));
      for (int k = 0; k < pairs; ++k) {
        bf16* to = planes + (c + 2 * k) * plane + p;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(words[0][k], lower, words[1][k]));
        _mm512_storeu_si512(to + plane, _mm512_permutex2var_epi16(words[0][k], upper, words[1][k]));
      }
    }
}

// The pairs of two channels for `pixels` pixels, rounded up to 32.
static inline void gather_pair(const bf16* lower, const bf16* upper, int64_t pixels, float* pairs) {
  const __m512i first = pick_interleaved(0), second = pick_interleaved(16);
  for (int64_t p = 0; p < pixels; p += kPairTurned) {
    const __m512i a = _mm512_loadu_si512(lower + p), b = _mm512_loadu_si512(upper + p);
    _mm512_storeu_si512(pairs + p, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(pairs + p + 16, _mm512_permutex2var_epi16(a, second, b));
  }
}

// The way back: `rows` rows of `columns` pixels, `row` pixels apart in the planes, to an image with
// filters innermost.
static void pixels_of_pairs(const bf16* planes, int64_t plane, int rows, int columns, int row,
                            int filters, bf16* y, int64_t y_row, int64_t y_pixel) {
  const __m512i first = pick_interleaved(0), second = pick_interleaved(16);
  const int64_t pixels = int64_t(rows - 1) * row + columns;
  int r = 0, column = 0;
  for (int64_t p = 0; p < pixels; p += kPairTurned) {
    bf16* to[kPairTurned];
    for (int k = 0; k < kPairTurned; ++k) {
      to[k] = r < rows && column < columns ? y + r * y_row + column * y_pixel : nullptr;
      if (++column == row) {
        column = 0;
        ++r;
      }
    }
    for (int f = 0; f < filters; f += kPairTurned) {
      const int some = least(kPairTurned, filters - f), pairs = ceil_div(some, 2);
      alignas(64) __m512i words[2][16] = {};
      for (int k = 0; k < pairs; ++k) {
        const bf16* from = planes + (f + 2 * k) * plane + p;
        const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + plane);
        words[0][k] = _mm512_permutex2var_epi16(a, first, b);
        words[1][k] = _mm512_permutex2var_epi16(a, second, b);
      }
      for (int i = 0; i < 2; ++i) {
        __m512i v[16];
        HC_UNROLL for (int k = 0; k < 16; ++k) v[k] = words[i][k];
        transpose_pairs(v);
        HC_UNROLL for (int k = 0; k < 16; ++k) {
          bf16* at = to[16 * i + k];
          if (!at) continue;
          if (some == kPairTurned)
            _mm512_storeu_si512(at + f, v[k]);
          else
            store_halves(at + f, v[k], some);
        }
      }
    }
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
