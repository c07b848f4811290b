// SPDX-License-Identifier: Apache-2.0
// Pixels in vectors, in 8 bits: a lane has four channels of one pixel, and NF filters of one group
// x NP vectors of pixels stay in registers over all steps of the group.
#pragma once
#include "int8_micro_avx512.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kInt8PixelVectors[kInt8TileFilters + 1] = {0, 8, 8, 7, 6, 5, 4, 3, 3};
constexpr int kInt8MostSums = 25 * 16;  // of a tile

struct Int8Run {
  const uint8_t* a;    // quads of the first pixel
  const int32_t* off;  // of each step, in bytes
  int steps;
  const int8_t* w;  // [steps][NF][4]
  const int32_t* bias;
  int32_t* sums;  // [NF][16 NP]
};

template <int NF, int NP> static void int8_run(const Int8Run& t) {
  __m512i acc[NF][NP];
  HC_UNROLL for (int i = 0; i < NF; ++i) {
    const __m512i b = _mm512_set1_epi32(t.bias[i]);
    HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = b;
  }
  const uint8_t* w = reinterpret_cast<const uint8_t*>(t.w);
  for (int s = 0; s < t.steps; ++s, w += NF * kQuad) {
    const uint8_t* a = t.a + t.off[s];
    __m512i x[NP];
    HC_UNROLL for (int j = 0; j < NP; ++j) x[j] = _mm512_loadu_si512(a + 64 * j);
    HC_UNROLL for (int i = 0; i < NF; ++i) {
      const __m512i b = _mm512_set1_epi32(four_bytes(w + kQuad * i));
      HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = dot(acc[i][j], x[j], b);
    }
  }
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j)
      _mm512_storeu_si512(t.sums + 16 * (i * NP + j), acc[i][j]);
}

// The sums of one filter for `vectors` vectors of pixels, as bytes; writes up to 48 more.
template <bool residual>
static void finish_pixels(const FinishVectors& f, const int32_t* sums, int vectors,
                          float multiplier, const uint8_t* res, uint8_t* y) {
  const __m512 m = _mm512_set1_ps(multiplier);
  for (int j = 0; j < vectors; j += 4) {
    __m512 scaled[4];
    HC_UNROLL for (int k = 0; k < 4; ++k) {
      const int v = j + k < vectors ? j + k : j;
      __m512 s = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + 16 * v)), m);
      if (residual) {
        const auto* at = reinterpret_cast<const __m128i*>(res + 16 * v);
        s = add_residual(f, s, _mm_loadu_si128(at));
      }
      scaled[k] = s;
    }
    _mm512_storeu_si512(y + 16 * j, bytes_of(f, scaled));
  }
}

using Int8RunKernel = void (*)(const Int8Run&);

template <int NF, int... p>
static Int8RunKernel int8_run_of(int vectors, std::integer_sequence<int, p...>) {
  static const Int8RunKernel table[] = {int8_run<NF, p + 1>...};
  return table[vectors - 1];
}
template <int NF = kInt8TileFilters> static Int8RunKernel int8_run_for(int filters, int vectors) {
  if constexpr (NF > 1)
    if (filters < NF) return int8_run_for<NF - 1>(filters, vectors);
  return int8_run_of<NF>(vectors, std::make_integer_sequence<int, kInt8PixelVectors[NF]>());
}

}  // namespace HETCONV_NS
}  // namespace hetconv
