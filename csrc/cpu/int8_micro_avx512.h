// SPDX-License-Identifier: Apache-2.0
// Tiles of P pixels x U units of 8 filters with vpdpbusd: in registers are the sums; each step
// broadcasts four bytes of every pixel, or shuffles a window of them.
#pragma once
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kInt8Units = 4;
// Pixels of a tile, by its units.
constexpr int kInt8Pixels[kInt8Units + 1] = {0, 14, 14, 12, 14};

HC_INLINE __m512i dot(__m512i sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); }
HC_INLINE __m256i dot(__m256i sum, __m256i x, __m256i w) { return _mm256_dpbusd_epi32(sum, x, w); }
HC_INLINE int32_t four_bytes(const uint8_t* a) {
  int32_t v;
  memcpy(&v, a, 4);
  return v;
}

struct FinishVectors {
  __m512 bound, res_multiplier;
  __m512i zero16, least, greatest, flip, res_zero;
  __m128i res_flip;
  bool bounded, plain;
};
HC_INLINE FinishVectors vectors_of(const Finish& f) {
  return {_mm512_set1_ps(f.bound),
          _mm512_set1_ps(f.res_multiplier),
          _mm512_set1_epi16(int16_t(f.zero)),
          _mm512_set1_epi8(char(f.least_byte)),
          _mm512_set1_epi8(char(f.greatest_byte)),
          _mm512_set1_epi8(char(f.flip)),
          _mm512_set1_epi32(f.res_zero),
          _mm_set1_epi8(char(f.res_flip)),
          f.bounded,
          f.plain};
}

HC_INLINE __m512 add_residual(const FinishVectors& f, __m512 t, __m128i r) {
  const __m512i q = _mm512_cvtepu8_epi32(_mm_xor_si128(r, f.res_flip));
  const __m512 v = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, f.res_zero));
  return _mm512_add_ps(t, _mm512_mul_ps(v, f.res_multiplier));
}
// Four vectors of scaled sums to 64 bytes; vector i's are bytes 16 i to 16 i + 15. Below -bound the
// conversion gives the least integer, which is as good.
HC_INLINE __m512i bytes_of(const FinishVectors& f, __m512 (&t)[4]) {
  if (__builtin_expect(!f.bounded, 0))
    HC_UNROLL for (int k = 0; k < 4; ++k) t[k] = _mm512_min_ps(t[k], f.bound);
  __m512i r[4];
  HC_UNROLL for (int k = 0; k < 4; ++k) r[k] = _mm512_cvtps_epi32(t[k]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(r[0], r[1]), f.zero16);
  const __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(r[2], r[3]), f.zero16);
  __m512i q = _mm512_packus_epi16(a, b);
  if (__builtin_expect(!f.plain, 0)) {
    q = _mm512_min_epu8(_mm512_max_epu8(q, f.least), f.greatest);
    q = _mm512_xor_si512(q, f.flip);
  }
  return _mm512_permutexvar_epi32(order, q);
}
template <int P, int V, bool residual>
HC_INLINE void finish_whole(const FinishVectors& f, const Int8Tile& t, const __m512i (&acc)[P][V]) {
  constexpr int n = P * V;
  __m512 multiplier[V];
  HC_UNROLL for (int v = 0; v < V; ++v) multiplier[v] = _mm512_loadu_ps(t.multiplier + 16 * v);
  HC_UNROLL for (int i = 0; i < n; i += 4) {
    __m512 scaled[4];
    HC_UNROLL for (int k = 0; k < 4; ++k) {
      const int p = (i + k < n ? i + k : i) / V, v = (i + k < n ? i + k : i) % V;
      __m512 s = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[p][v]), multiplier[v]);
      if (residual) {
        const uint8_t* at = t.res + p * t.res_pitch + 16 * v;
        s = add_residual(f, s, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
      }
      scaled[k] = s;
    }
    const __m512i q = bytes_of(f, scaled);
    if (V == 2) {
      HC_UNROLL for (int k = 0; k < 4; k += 2) if (i + k < n)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(t.y + (i + k) / 2 * t.y_pitch),
                              k == 0 ? _mm512_castsi512_si256(q) : _mm512_extracti64x4_epi64(q, 1));
    } else {
      uint8_t* y = t.y + i * t.y_pitch;
      const auto store = [](uint8_t* at, __m128i v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), v);
      };
      store(y, _mm512_castsi512_si128(q));
      if (i + 1 < n) store(y + t.y_pitch, _mm512_extracti32x4_epi32(q, 1));
      if (i + 2 < n) store(y + 2 * t.y_pitch, _mm512_extracti32x4_epi32(q, 2));
      if (i + 3 < n) store(y + 3 * t.y_pitch, _mm512_extracti32x4_epi32(q, 3));
    }
  }
}

// Halves of vectors, 8 filters each: those of two pixels make a vector.
template <int P, bool residual>
HC_INLINE void finish_halves(const FinishVectors& f, const Int8Tile& t, int lane,
                             const __m256i (&half)[P]) {
  const __m512 multiplier = _mm512_castpd_ps(_mm512_broadcast_f64x4(
      _mm256_loadu_pd(reinterpret_cast<const double*>(t.multiplier + lane))));
  HC_UNROLL for (int i = 0; i < P; i += 8) {
    __m512 scaled[4];
    HC_UNROLL for (int k = 0; k < 4; ++k) {
      const int p = i + 2 * k < P ? i + 2 * k : i, next = p + 1 < P ? p + 1 : p;
      const __m512i sums = _mm512_inserti64x4(_mm512_castsi256_si512(half[p]), half[next], 1);
      __m512 s = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), multiplier);
      if (residual) {
        const auto eight = [&](int q) __attribute__((always_inline)) {
          return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(t.res + q * t.res_pitch + lane));
        };
        s = add_residual(f, s, _mm_unpacklo_epi64(eight(p), eight(next)));
      }
      scaled[k] = s;
    }
    alignas(64) uint64_t bytes[8];
    _mm512_store_si512(bytes, bytes_of(f, scaled));
    HC_UNROLL for (int k = 0; k < 8; ++k) if (i + k < P)
        memcpy(t.y + (i + k) * t.y_pitch + lane, &bytes[k], 8);
  }
}

// U units: U / 2 whole vectors, and half a one. Few sums are kept several times, so that products
// need not wait for one another.
template <int P, int U> static void int8_tile(const Int8Tile& t, const Finish& finish) {
  constexpr int V = U / 2, H = U % 2, lanes = U * kUnit;
  constexpr int S = P * (V + H) >= 5 ? 1 : P * (V + H) >= 3 ? 2 : 4;
  constexpr int step = lanes * kQuad;
  __m512i acc[S][P][V + 1];
  __m256i half[S][P];
  HC_UNROLL for (int s = 0; s < S; ++s) {
    HC_UNROLL for (int v = 0; v < V; ++v) {
      const __m512i b = s ? _mm512_setzero_si512() : _mm512_loadu_si512(t.bias + 16 * v);
      HC_UNROLL for (int p = 0; p < P; ++p) acc[s][p][v] = b;
    }
    if (H) {
      const __m256i* at = reinterpret_cast<const __m256i*>(t.bias + 16 * V);
      const __m256i b = s ? _mm256_setzero_si256() : _mm256_loadu_si256(at);
      HC_UNROLL for (int p = 0; p < P; ++p) half[s][p] = b;
    }
  }
  const int8_t* w = t.w;
  const auto quad = [&](int k, auto split) __attribute__((always_inline)) {
    constexpr int s = decltype(split)::value;
    const uint8_t* a = t.a + t.off[k];
    __m512i b[V + 1];
    __m256i c = _mm256_setzero_si256();
    HC_UNROLL for (int v = 0; v < V; ++v) b[v] = _mm512_loadu_si512(w + 64 * v);
    if (H) c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 64 * V));
    w += step;
    HC_UNROLL for (int p = 0; p < P; ++p) {
      const int32_t four = four_bytes(a + p * t.pitch);
      if (V > 0) {
        const __m512i q = _mm512_set1_epi32(four);
        HC_UNROLL for (int v = 0; v < V; ++v) acc[s][p][v] = dot(acc[s][p][v], q, b[v]);
        if (H) half[s][p] = dot(half[s][p], _mm512_castsi512_si256(q), c);
      } else {
        half[s][p] = dot(half[s][p], _mm256_set1_epi32(four), c);
      }
    }
  };
  int k = 0;
  if constexpr (S == 2) {
    for (; k + 2 <= t.quads; k += 2) {
      quad(k, std::integral_constant<int, 0>());
      quad(k + 1, std::integral_constant<int, 1>());
    }
  } else if constexpr (S == 4) {
    for (; k + 4 <= t.quads; k += 4) {
      quad(k, std::integral_constant<int, 0>());
      quad(k + 1, std::integral_constant<int, 1>());
      quad(k + 2, std::integral_constant<int, 2>());
      quad(k + 3, std::integral_constant<int, 3>());
    }
  }
  for (; k < t.quads; ++k) quad(k, std::integral_constant<int, 0>());
  HC_UNROLL for (int s = 1; s < S; ++s) HC_UNROLL for (int p = 0; p < P; ++p) {
    HC_UNROLL for (int v = 0; v < V; ++v) acc[0][p][v] =
        _mm512_add_epi32(acc[0][p][v], acc[s][p][v]);
    if (H) half[0][p] = _mm256_add_epi32(half[0][p], half[s][p]);
  }
  const int end = t.quads + t.shuffles;
  // Taps of a kernel row, `apart` pixels from one another: each pixel is shuffled once for all the
  // outputs that read it.
  const auto row = [&](auto taps, auto apart) __attribute__((always_inline)) {
    constexpr int count = decltype(taps)::value, between = decltype(apart)::value;
    constexpr int pixels = P + (count - 1) * between;
    const uint8_t* a = t.a + t.off[k];
    const auto window = [&](int q) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + q * t.pitch));
    };
    HC_UNROLL for (int v = 0; v < V; ++v) {
      const __m512i picks = _mm512_loadu_si512(w + 64 * v);
      __m512i b[count];
      HC_UNROLL for (int c = 0; c < count; ++c) b[c] =
          _mm512_loadu_si512(w + (2 * c + 1) * step + 64 * v);
      HC_UNROLL for (int q = 0; q < pixels; ++q) {
        const __m512i x = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(window(q)), picks);
        HC_UNROLL for (int c = 0; c < count; ++c) {
          const int p = q - c * between;
          if (p >= 0 && p < P) acc[0][p][v] = dot(acc[0][p][v], x, b[c]);
        }
      }
    }
    if (H) {
      const auto at = [&](int i) __attribute__((always_inline)) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i * step + 64 * V));
      };
      const __m256i picks = at(0);
      __m256i b[count];
      HC_UNROLL for (int c = 0; c < count; ++c) b[c] = at(2 * c + 1);
      HC_UNROLL for (int q = 0; q < pixels; ++q) {
        const __m256i x = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(window(q)), picks);
        HC_UNROLL for (int c = 0; c < count; ++c) {
          const int p = q - c * between;
          if (p >= 0 && p < P) half[0][p] = dot(half[0][p], x, b[c]);
        }
      }
    }
    k += count;
    w += 2 * count * step;
  };
  using std::integral_constant;
  for (int i = 0; i < t.triples; ++i) row(integral_constant<int, 3>(), integral_constant<int, 1>());
  for (int i = 0; i < t.twins; ++i) row(integral_constant<int, 2>(), integral_constant<int, 2>());
  for (; k < end; ++k) {
    const uint8_t* a = t.a + t.off[k];
    HC_UNROLL for (int p = 0; p < P; ++p) {
      const __m128i window = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + p * t.pitch));
      const __m512i whole = _mm512_broadcast_i32x4(window);
      HC_UNROLL for (int v = 0; v < V; ++v) {
        const __m512i x = _mm512_shuffle_epi8(whole, _mm512_loadu_si512(w + 64 * v));
        acc[0][p][v] = dot(acc[0][p][v], x, _mm512_loadu_si512(w + step + 64 * v));
      }
      if (H) {
        const __m256i* at = reinterpret_cast<const __m256i*>(w + 64 * V);
        const __m256i* weights = reinterpret_cast<const __m256i*>(w + step + 64 * V);
        const __m256i x =
            _mm256_shuffle_epi8(_mm512_castsi512_si256(whole), _mm256_loadu_si256(at));
        half[0][p] = dot(half[0][p], x, _mm256_loadu_si256(weights));
      }
    }
    w += 2 * step;
  }
  if (t.sums) {
    HC_UNROLL for (int p = 0; p < P; ++p) {
      HC_UNROLL for (int v = 0; v < V; ++v)
          _mm512_storeu_si512(t.sums + p * lanes + 16 * v, acc[0][p][v]);
      if (H)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(t.sums + p * lanes + 16 * V), half[0][p]);
    }
    return;
  }
  const FinishVectors f = vectors_of(finish);
  if constexpr (V > 0) {
    __m512i whole[P][V];
    HC_UNROLL for (int p = 0; p < P; ++p) HC_UNROLL for (int v = 0; v < V; ++v) whole[p][v] =
        acc[0][p][v];
    if (t.res)
      finish_whole<P, V, true>(f, t, whole);
    else
      finish_whole<P, V, false>(f, t, whole);
  }
  if constexpr (H > 0) {
    if (t.res)
      finish_halves<P, true>(f, t, 16 * V, half[0]);
    else
      finish_halves<P, false>(f, t, 16 * V, half[0]);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
