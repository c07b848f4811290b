// SPDX-License-Identifier: Apache-2.0
// Between pixels of channels and planes of pixels, a square at a time whose side is a vector of
// elements: bytes 64 x 64, bfloat16 32 x 32.
//
// What is transposed are words of 32 bits, each with the `parts` channels of one pixel. An Order
// says how the parts of words become vectors of one channel each, and back:
//   split(v)     v[i] has the words of 16 pixels, of part i of the square; v[j] channel j of all
//   join(v)      the way back, with the pixels of a vector in lanes of its own choice:
//   pixel(i, k)  which pixel of the square is in word k of v[i]
#pragma once
#include "pack_vectors.h"

namespace hetconv {
namespace HETCONV_NS {

HC_INLINE __m512i load_64(const void* p) { return _mm512_loadu_si512(p); }
HC_INLINE void store_64(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

// 16 vectors of 16 words: word i of vector k becomes word k of vector i.
HC_INLINE void transpose_words(__m512i* r) { transpose<float>(reinterpret_cast<Vec<float>*>(r)); }

template <class T> constexpr int kParts = 4 / int(sizeof(T));   // channels of a word
template <class T> constexpr int kTransposed = 16 * kParts<T>;  // pixels and channels of a square

// Planes of `pixels` pixels with `channels` channels each, rounded up to a square of both: x must
// be readable that far.
template <class Order, class T>
static void planes_of(const T* x, int64_t pitch, int64_t pixels, int channels, T* planes,
                      int64_t plane) {
  constexpr int parts = kParts<T>, side = kTransposed<T>;
  alignas(64) __m512i words[parts][16];
  for (int64_t p = 0; p < pixels; p += side)
    for (int c = 0; c < channels; c += side) {
      for (int i = 0; i < parts; ++i) {
        __m512i r[16];
        const T* from = x + (p + 16 * i) * pitch + c;
        HC_UNROLL for (int k = 0; k < 16; ++k) r[k] = load_64(from + k * pitch);
        transpose_words(r);
        HC_UNROLL for (int k = 0; k < 16; ++k) words[i][k] = r[k];
      }
      const int count = least(16, ceil_div(channels - c, parts));
      for (int k = 0; k < count; ++k) {
        __m512i v[parts];
        HC_UNROLL for (int i = 0; i < parts; ++i) v[i] = words[i][k];
        Order::split(v);
        T* to = planes + (c + parts * k) * plane + p;
        HC_UNROLL for (int j = 0; j < parts; ++j) store_64(to + j * plane, v[j]);
      }
    }
}

// The way back: `rows` rows of `columns` pixels, `row` pixels apart in the planes, to an image with
// filters innermost.
template <class Order, class T>
static void pixels_of(const T* planes, int64_t plane, int rows, int columns, int row, int filters,
                      T* y, int64_t y_row, int64_t y_pixel) {
  constexpr int parts = kParts<T>, side = kTransposed<T>;
  alignas(64) __m512i words[parts][16];
  const int64_t pixels = int64_t(rows - 1) * row + columns;
  int r = 0, column = 0;
  for (int64_t p = 0; p < pixels; p += side) {
    T* to[side];
    for (int k = 0; k < side; ++k) {
      to[k] = r < rows && column < columns ? y + r * y_row + column * y_pixel : nullptr;
      if (++column == row) {
        column = 0;
        ++r;
      }
    }
    for (int f = 0; f < filters; f += side) {
      const int some = least(side, filters - f), count = ceil_div(some, parts);
      const __mmask64 bytes = ~uint64_t(0) >> (64 - some * int(sizeof(T)));
      for (int k = 0; k < count; ++k) {
        const T* from = planes + (f + parts * k) * plane + p;
        __m512i v[parts];
        HC_UNROLL for (int i = 0; i < parts; ++i) v[i] = load_64(from + i * plane);
        Order::join(v);
        HC_UNROLL for (int i = 0; i < parts; ++i) words[i][k] = v[i];
      }
      for (int i = 0; i < parts; ++i) {
        __m512i v[16];
        HC_UNROLL for (int k = 0; k < 16; ++k) v[k] =
            k < count ? words[i][k] : _mm512_setzero_si512();
        transpose_words(v);
        HC_UNROLL for (int k = 0; k < 16; ++k) {
          T* at = to[Order::pixel(i, k)];
          if (!at) continue;
          if (some == side)
            store_64(at + f, v[k]);
          else
            _mm512_mask_storeu_epi8(at + f, bytes, v[k]);
        }
      }
    }
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
