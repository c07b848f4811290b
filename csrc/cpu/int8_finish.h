// SPDX-License-Identifier: Apache-2.0
// What becomes of the sums, one number at a time. Every float32 operation is rounded once: sources
// that include this are compiled with -ffp-contract=off.
#pragma once
#include <cmath>
#include "int8.h"
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

// What a tile of one ISA reads and writes.
struct Int8Tile {
  const uint8_t* a;  // of the first pixel
  int64_t pitch;     // to the next
  const int32_t* off;
  int quads, shuffles;
  int triples, twins;  // of the shuffles; none where neighbouring taps are not neighbouring pixels
  const int8_t* w;
  const int32_t* bias;
  const float* multiplier;
  uint8_t* y;
  int64_t y_pitch;
  const uint8_t* res;  // or null
  int64_t res_pitch;
  int32_t* sums;  // not null: the sums go there, [pixels][lanes], and nothing to y
};

// Bytes are finished as unsigned ones and flipped to signed ones in the end.
struct Finish {
  float bound;      // of a scaled sum that is to be a byte: -bound..bound
  bool bounded;     // scaled sums are within int32, whatever the activations are
  float low, high;  // of a float32 result
  int zero;         // of the result, 128 more where that is signed
  uint8_t least_byte, greatest_byte;
  uint8_t flip;
  bool plain;  // all of 0..255 and not flipped: saturation is enough
  uint8_t res_flip;
  int res_zero;  // 128 more where the residual is signed
  float res_multiplier;
};

HC_INLINE int unsigned_zero(Byte type, int zero) { return type == Byte::s8 ? zero + 128 : zero; }
HC_INLINE uint8_t flip_of(Byte type) { return type == Byte::s8 ? 0x80 : 0; }

static inline Finish finish_for(Int8Out type, int zero, float low, float high) {
  Finish f{};
  f.bound = 32767.0f;
  f.low = low;
  f.high = high;
  if (type != Int8Out::f32) {
    const int more = type == Int8Out::s8 ? 128 : 0;
    f.zero = zero + more;
    f.least_byte = uint8_t(int(low) + more);
    f.greatest_byte = uint8_t(int(high) + more);
    f.flip = type == Int8Out::s8 ? 0x80 : 0;
    f.plain = f.least_byte == 0 && f.greatest_byte == 255 && !f.flip;
  }
  return f;
}

HC_INLINE float clamped(float t, float low, float high) {
  t = t > low ? t : low;
  return t < high ? t : high;
}

// A scaled sum as a byte. Rounding comes first: the bounds are integers, so it gives the same.
HC_INLINE uint8_t byte_of(const Finish& f, float t) {
  const int q = int(std::nearbyintf(clamped(t, -f.bound, f.bound))) + f.zero;
  const int in = q < f.least_byte ? f.least_byte : q > f.greatest_byte ? f.greatest_byte : q;
  return uint8_t(in) ^ f.flip;
}

HC_INLINE float residual_of(const Finish& f, uint8_t r) {
  return float(int(r ^ f.res_flip) - f.res_zero) * f.res_multiplier;
}

// The sums of a tile as float32.
static inline void finish_floats(const Finish& f, const Int8Tile& t, float* y, int64_t y_pitch,
                                 int pixels, int lanes, int filters, const int* ids,
                                 const uint8_t* res) {
  for (int p = 0; p < pixels; ++p)
    for (int l = 0; l < filters; ++l) {
      float v = float(t.sums[p * lanes + l]) * t.multiplier[l];
      if (res) v = v + residual_of(f, res[p * y_pitch + ids[l]]);
      y[p * y_pitch + ids[l]] = clamped(v, f.low, f.high);
    }
}

// The bytes of filters that are no neighbours, or too few: from a tile's pixels to where they
// belong, and back.
static inline void spread_filters(const uint8_t* tile, int pixels, int lanes, int filters,
                                  const int* ids, bool contiguous, uint8_t* y, int64_t y_pitch) {
  for (int p = 0; p < pixels; ++p, tile += lanes, y += y_pitch) {
    if (contiguous) {
      memcpy(y + ids[0], tile, size_t(filters));
      continue;
    }
    int l = 0;
    for (; l + 8 <= filters; l += 8) {
      uint64_t eight;
      memcpy(&eight, tile + l, 8);
      HC_UNROLL for (int k = 0; k < 8; ++k) y[ids[l + k]] = uint8_t(eight >> 8 * k);
    }
    for (; l < filters; ++l) y[ids[l]] = tile[l];
  }
}
static inline void collect_filters(uint8_t* tile, int pixels, int lanes, int filters,
                                   const int* ids, const uint8_t* y, int64_t y_pitch) {
  for (int p = 0; p < pixels; ++p, tile += lanes, y += y_pitch)
    for (int l = 0; l < filters; ++l) tile[l] = y[ids[l]];
}

// The same where the bytes among each 64 channels are brought into their order at once.
#if defined(__AVX512BW__)
__attribute__((target("avx512vbmi"))) static void permute_spread(const uint8_t* tile, int pixels,
                                                                 int lanes,
                                                                 const Int8Spread* spread,
                                                                 int spreads, uint8_t* y,
                                                                 int64_t y_pitch) {
  const __mmask32 live = lanes == 32 ? ~uint32_t(0) : (uint32_t(1) << lanes) - 1;
  for (int k = 0; k < spreads; ++k) {
    const __m512i pick = _mm512_loadu_si512(spread[k].pick);
    const __mmask64 channels = spread[k].channels;
    const uint8_t* from = tile;
    uint8_t* to = y + spread[k].at;
    for (int p = 0; p < pixels; ++p, from += lanes, to += y_pitch) {
      const __m256i v = _mm256_maskz_loadu_epi8(live, from);
      _mm512_mask_storeu_epi8(to, channels,
                              _mm512_permutexvar_epi8(pick, _mm512_castsi256_si512(v)));
    }
  }
}
__attribute__((target("avx512vbmi"))) static void permute_collect(uint8_t* tile, int pixels,
                                                                  int lanes,
                                                                  const Int8Spread* spread,
                                                                  int spreads, const uint8_t* y,
                                                                  int64_t y_pitch) {
  const __mmask32 live = lanes == 32 ? ~uint32_t(0) : (uint32_t(1) << lanes) - 1;
  for (int p = 0; p < pixels; ++p, tile += lanes, y += y_pitch) {
    __m256i v = _mm256_setzero_si256();
    for (int k = 0; k < spreads; ++k) {
      const __m512i x = _mm512_maskz_loadu_epi8(spread[k].channels, y + spread[k].at);
      const __m512i back = _mm512_castsi256_si512(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(spread[k].back)));
      v = _mm256_mask_mov_epi8(v, spread[k].lanes,
                               _mm512_castsi512_si256(_mm512_permutexvar_epi8(back, x)));
    }
    _mm256_mask_storeu_epi8(tile, live, v);
  }
}
#endif

}  // namespace HETCONV_NS
}  // namespace hetconv
