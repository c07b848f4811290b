// SPDX-License-Identifier: Apache-2.0
// Bytes between pixels of channels and planes of pixels, in one of two orders, and the quads that
// steps read.
//
// A plane has a channel of 64 pixels in a vector. Woven, 128-bit lane l holds the pixels
// 16 i + 4 l + k as its byte 4 i + k, i and k from 0 to 3: then quads of any four planes come out
// in order, two rounds of unpacking later.
#pragma once
#include "int8_finish.h"
#include "transpose.h"

namespace hetconv {
namespace HETCONV_NS {

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

struct Woven {
  HC_INLINE void split(__m512i* v) {
    // Bytes 4 i + j of each lane become its bytes 4 j + i.
    const __m512i weave = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    HC_UNROLL for (int i = 0; i < 4; ++i) v[i] = _mm512_shuffle_epi8(v[i], weave);
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]),
                  e = _mm512_unpackhi_epi32(v[0], v[1]), f = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, b);
    v[1] = _mm512_unpackhi_epi64(a, b);
    v[2] = _mm512_unpacklo_epi64(e, f);
    v[3] = _mm512_unpackhi_epi64(e, f);
  }
};

// Planes in the order of pixels.
struct Straight {
  HC_INLINE void split(__m512i* v) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    Woven::split(v);
    HC_UNROLL for (int i = 0; i < 4; ++i) v[i] = _mm512_permutexvar_epi32(order, v[i]);
  }
  HC_INLINE void join(__m512i* v) { quads_of_planes(v[0], v[1], v[2], v[3], v); }
  static constexpr int pixel(int i, int k) { return 16 * (k / 4) + 4 * i + k % 4; }
};

// Of woven planes, the quad of four channels for `pixels` pixels, rounded up to 64.
static inline void gather_quad(const uint8_t* planes, int64_t plane, const int* channels,
                               int64_t pixels, uint8_t* quads) {
  const uint8_t *a = planes + channels[0] * plane, *b = planes + channels[1] * plane,
                *c = planes + channels[2] * plane, *d = planes + channels[3] * plane;
  for (int64_t p = 0; p < pixels; p += 64, quads += 64 * kQuad) {
    __m512i q[4];
    quads_of_planes(load_64(a + p), load_64(b + p), load_64(c + p), load_64(d + p), q);
    HC_UNROLL for (int i = 0; i < 4; ++i) store_64(quads + 64 * i, q[i]);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
