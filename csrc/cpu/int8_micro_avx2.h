// SPDX-License-Identifier: Apache-2.0
// Tiles of P pixels x U vectors of 8 filters, 256 bits wide: with vpdpbusd where the processor has
// AVX-VNNI, else with products of 16 bits. (vpmaddubsw saturates: 255 * 127 * 2 is beyond int16.)
#pragma once
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kInt8Units = 2;
#if defined(__AVXVNNI__)
constexpr int kInt8Pixels[kInt8Units + 1] = {0, 10, 6};
struct Weights {
  __m256i w;
};
HC_INLINE Weights weights_of(__m256i w) { return {w}; }
struct Bytes {
  __m256i x;
};
HC_INLINE Bytes spread_bytes(__m256i x) { return {x}; }
HC_INLINE __m256i dot(__m256i sum, const Bytes& x, const Weights& w) {
  return _mm256_dpbusd_avx_epi32(sum, x.x, w.w);
}
#else
constexpr int kInt8Pixels[kInt8Units + 1] = {0, 8, 4};
struct Weights {
  __m256i even, odd;
};
HC_INLINE Weights weights_of(__m256i w) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}
struct Bytes {
  __m256i even, odd;
};
HC_INLINE Bytes spread_bytes(__m256i x) {
  return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
}
HC_INLINE __m256i dot(__m256i sum, const Bytes& x, const Weights& w) {
  const __m256i both =
      _mm256_add_epi32(_mm256_madd_epi16(x.even, w.even), _mm256_madd_epi16(x.odd, w.odd));
  return _mm256_add_epi32(sum, both);
}
#endif

HC_INLINE __m256i load8(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

template <bool residual>
HC_INLINE void finish8(const Finish& f, __m256i sums, const float* multiplier, const uint8_t* res,
                       uint8_t* y) {
  __m256 t = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_loadu_ps(multiplier));
  if (residual) {
    const __m128i r = _mm_xor_si128(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(res)),
                                    _mm_set1_epi8(char(f.res_flip)));
    const __m256i q = _mm256_sub_epi32(_mm256_cvtepu8_epi32(r), _mm256_set1_epi32(f.res_zero));
    t = _mm256_add_ps(t, _mm256_mul_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(f.res_multiplier)));
  }
  // Below -bound the conversion gives the least integer, which is as good.
  if (!f.bounded) t = _mm256_min_ps(t, _mm256_set1_ps(f.bound));
  const __m256i r = _mm256_cvtps_epi32(t);
  const __m128i pairs =
      _mm_adds_epi16(_mm_packs_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)),
                     _mm_set1_epi16(int16_t(f.zero)));
  __m128i q = _mm_packus_epi16(pairs, pairs);
  if (!f.plain) {
    q = _mm_max_epu8(q, _mm_set1_epi8(char(f.least_byte)));
    q = _mm_min_epu8(q, _mm_set1_epi8(char(f.greatest_byte)));
    q = _mm_xor_si128(q, _mm_set1_epi8(char(f.flip)));
  }
  _mm_storel_epi64(reinterpret_cast<__m128i*>(y), q);
}

template <int P, int U> static void int8_tile(const Int8Tile& t, const Finish& f) {
  constexpr int lanes = U * kUnit, step = lanes * kQuad;
  __m256i acc[P][U];
  HC_UNROLL for (int p = 0; p < P; ++p) HC_UNROLL for (int u = 0; u < U; ++u) acc[p][u] =
      load8(t.bias + 8 * u);
  const int8_t* w = t.w;
  for (int k = 0; k < t.quads; ++k, w += step) {
    const uint8_t* a = t.a + t.off[k];
    Weights b[U];
    HC_UNROLL for (int u = 0; u < U; ++u) b[u] = weights_of(load8(w + 32 * u));
    HC_UNROLL for (int p = 0; p < P; ++p) {
      int32_t four;
      memcpy(&four, a + p * t.pitch, 4);
      const Bytes x = spread_bytes(_mm256_set1_epi32(four));
      HC_UNROLL for (int u = 0; u < U; ++u) acc[p][u] = dot(acc[p][u], x, b[u]);
    }
  }
  for (int k = t.quads; k < t.quads + t.shuffles; ++k, w += 2 * step) {
    const uint8_t* a = t.a + t.off[k];
    HC_UNROLL for (int p = 0; p < P; ++p) {
      const __m128i window = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + p * t.pitch));
      const __m256i both = _mm256_broadcastsi128_si256(window);
      HC_UNROLL for (int u = 0; u < U; ++u) {
        const Bytes x = spread_bytes(_mm256_shuffle_epi8(both, load8(w + 32 * u)));
        acc[p][u] = dot(acc[p][u], x, weights_of(load8(w + step + 32 * u)));
      }
    }
  }
  HC_UNROLL for (int p = 0; p < P; ++p) HC_UNROLL for (int u = 0; u < U; ++u) {
    if (t.sums) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(t.sums + p * lanes + 8 * u), acc[p][u]);
      continue;
    }
    uint8_t* y = t.y + p * t.y_pitch + 8 * u;
    if (t.res)
      finish8<true>(f, acc[p][u], t.multiplier + 8 * u, t.res + p * t.res_pitch + 8 * u, y);
    else
      finish8<false>(f, acc[p][u], t.multiplier + 8 * u, nullptr, y);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
