// SPDX-License-Identifier: Apache-2.0
// Loops over weights of which a mask says which exist, for the instruction set of the object that
// includes this. The others count as zeros whatever they hold, NaN too: they are chosen away, not
// multiplied.
#pragma once
#include <cstring>

#include "masking.h"
#include "vec.h"

#if defined(__clang__)
#define HC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define HC_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace hetconv {
namespace HETCONV_NS {

// At any address: a weight may lie in a mapped file.
typedef uint16_t any_u16 __attribute__((aligned(1), may_alias));
typedef uint32_t any_u32 __attribute__((aligned(1), may_alias));
typedef uint64_t any_u64 __attribute__((aligned(1), may_alias));
typedef float any_f32 __attribute__((aligned(1), may_alias));

HC_INLINE vec_f32 load_any(const any_f32* p) {
  vec_f32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// y may be w.
template <class T>
static void mask_from(const char* w, const uint8_t* live, char* y, int64_t from, int64_t to) {
  const T* in = reinterpret_cast<const T*>(w);
  T* out = reinterpret_cast<T*>(y);
  HC_INDEPENDENT
  for (int64_t i = from; i < to; ++i) out[i] = live[i] ? in[i] : T(0);
}

// w where the byte is not 0, else 0. Not a choice, of which compilers make gathers under a mask:
// ten times as slow.
template <class T> HC_INLINE T kept_if(T w, uint8_t live) { return w & T(T(0) - T(live != 0)); }

// Filters [C][taps] become [taps][C], the order of `live`; blocks of channels stay in the cache
// while their taps are read one after another.
template <class T>
static void transpose_from(const char* w, const uint8_t* live, char* y, int64_t C, int64_t taps,
                           int64_t from, int64_t to) {
  constexpr int64_t kChannels = 128;
  for (int64_t f = from; f < to; ++f)
    for (int64_t c0 = 0; c0 < C; c0 += kChannels) {
      const int64_t n = C - c0 < kChannels ? C - c0 : kChannels;
      const T* in = reinterpret_cast<const T*>(w) + (f * C + c0) * taps;
      T* out = reinterpret_cast<T*>(y) + f * C * taps + c0;
      const uint8_t* exists = live + f * C * taps + c0;
      for (int64_t t = 0; t < taps; ++t) {
        HC_INDEPENDENT
        for (int64_t c = 0; c < n; ++c)
          out[t * C + c] = kept_if<T>(in[c * taps + t], exists[t * C + c]);
      }
    }
}

// The lanes of a vector of weights whose bits are set, lowest first.
HC_INLINE vec_f32 existing(const any_f32* w, const uint8_t* bits, int64_t c) {
  constexpr int L = VL<float>;
  uint32_t chunk = bits[c / 8];
  if constexpr (L == 16) chunk |= uint32_t(bits[c / 8 + 1]) << 8;
  if constexpr (L == 4) chunk >>= c % 8;
  vec_i32 select, values;
  for (int l = 0; l < L; ++l) select[l] = 1 << l;
  std::memcpy(&values, w + c, sizeof values);
  values &= ((vec_i32{} + int32_t(chunk)) & select) != 0;
  return (vec_f32)values;
}

// R rows of x times filters [from, to); the weights are read once.
template <int R>
static void multiply_rows(const MaskedProduct& p, int64_t row, int64_t from, int64_t to) {
  constexpr int L = VL<float>, kChains = R == 1 ? 4 : R == 2 ? 2 : 1;
  const int64_t C = p.C, whole = C / (L * kChains) * (L * kChains);
  const any_f32* x = static_cast<const any_f32*>(p.x) + row * C;
  for (int64_t f = from; f < to; ++f) {
    const any_f32* w = static_cast<const any_f32*>(p.w) + f * C;
    const uint8_t* bits = p.bits + f * ((C + 7) / 8);
    vec_f32 sums[R][kChains] = {};
    for (int64_t c = 0; c < whole; c += L * kChains) {
      HC_UNROLL
      for (int k = 0; k < kChains; ++k) {
        const vec_f32 weight = existing(w, bits, c + k * L);
        HC_UNROLL
        for (int r = 0; r < R; ++r) sums[r][k] += weight * load_any(x + r * C + c + k * L);
      }
    }
    for (int r = 0; r < R; ++r) {
      vec_f32 sum = sums[r][0];
      for (int k = 1; k < kChains; ++k) sum += sums[r][k];
      float total = 0.0f;
      for (int l = 0; l < L; ++l) total += sum[l];
      for (int64_t c = whole; c < C; ++c)
        if (bits[c / 8] >> c % 8 & 1) total += w[c] * x[r * C + c];
      p.y[(row + r) * p.F + f] = total + (p.bias ? static_cast<const any_f32*>(p.bias)[f] : 0.0f);
    }
  }
}

static void multiply_masked(const MaskedProduct& p, int64_t from, int64_t to) {
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) multiply_rows<4>(p, row, from, to);
  if (p.rows - row >= 2) {
    multiply_rows<2>(p, row, from, to);
    row += 2;
  }
  if (row < p.rows) multiply_rows<1>(p, row, from, to);
}

// Some channels of all frequencies at a time: first their coefficients by frequency, then sums.
static void images_from(const MaskedImages& p, int64_t from, int64_t to) {
  constexpr int V = 16 / VL<float>;
  constexpr int64_t kChannels = V * VL<float>;
  any_f32* const y = p.y;
  alignas(64) any_f32 coefficients[kMostTaps * kChannels];
  const int64_t C = p.C, count = p.images, taps = p.taps;
  for (int64_t f = from; f < to; ++f)
    for (int64_t c0 = 0; c0 < C; c0 += kChannels) {
      const int64_t n = least(kChannels, C - c0);
      const any_u32* in = static_cast<const any_u32*>(p.w) + (f * C + c0) * count;
      const uint8_t* exists = p.live + f * C * count + c0;
      for (int64_t u = 0; u < count; ++u) {
        any_u32* out = reinterpret_cast<any_u32*>(coefficients + u * kChannels);
        HC_INDEPENDENT
        for (int64_t c = 0; c < n; ++c)
          out[c] = kept_if<any_u32>(in[c * count + u], exists[u * C + c]);
      }
      for (int64_t t = 0; t < taps; ++t) {
        vec_f32 sum[V] = {};
        for (int64_t u = 0; u < count; ++u) {
          const vec_f32 image = splat<float>(p.image[u * taps + t]);
          HC_UNROLL
          for (int v = 0; v < V; ++v)
            sum[v] += load_any(coefficients + u * kChannels + v * VL<float>) * image;
        }
        float sums[kChannels];
        std::memcpy(sums, sum, sizeof sums);
        const int64_t step = p.transposed ? 1 : taps;
        any_f32* out = y + (p.transposed ? (f * taps + t) * C + c0 : (f * C + c0) * taps + t);
        for (int64_t c = 0; c < n; ++c) out[c * step] = sums[c];
      }
    }
}

}  // namespace HETCONV_NS
}  // namespace hetconv

#define HETCONV_MASK_LOOPS                                                                   \
  MaskLoops {                                                                                \
    {HETCONV_NS::mask_from<HETCONV_NS::any_u16>, HETCONV_NS::mask_from<HETCONV_NS::any_u32>, \
     HETCONV_NS::mask_from<HETCONV_NS::any_u64>},                                            \
        {HETCONV_NS::transpose_from<HETCONV_NS::any_u16>,                                    \
         HETCONV_NS::transpose_from<HETCONV_NS::any_u32>,                                    \
         HETCONV_NS::transpose_from<HETCONV_NS::any_u64>},                                   \
        HETCONV_NS::multiply_masked, HETCONV_NS::images_from                                 \
  }
