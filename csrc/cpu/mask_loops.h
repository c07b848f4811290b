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

// Filters [C][taps] become [taps][C], the order of `live`; blocks of channels stay in the cache
// while their taps are read one after another.
template <class T>
static void turn_from(const char* w, const uint8_t* live, char* y, int64_t C, int64_t taps,
                      int64_t from, int64_t to) {
  constexpr int64_t kChannels = 128;
  for (int64_t f = from; f < to; ++f)
    for (int64_t c0 = 0; c0 < C; c0 += kChannels) {
      const int64_t n = C - c0 < kChannels ? C - c0 : kChannels;
      const T* in = reinterpret_cast<const T*>(w) + (f * C + c0) * taps;
      T* out = reinterpret_cast<T*>(y) + f * C * taps + c0;
      const uint8_t* exists = live + f * C * taps + c0;
      for (int64_t t = 0; t < taps; ++t) {
        // Not a choice, of which compilers make gathers under a mask: ten times as slow.
        HC_INDEPENDENT
        for (int64_t c = 0; c < n; ++c)
          out[t * C + c] = in[c * taps + t] & T(T(0) - T(exists[t * C + c] != 0));
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

// Without a branch, which random masks would mispredict at every second coefficient.
HC_INLINE float kept_if(const any_f32* value, uint8_t live) {
  uint32_t bits;
  std::memcpy(&bits, value, sizeof bits);
  bits &= 0u - uint32_t(live != 0);
  float kept;
  std::memcpy(&kept, &bits, sizeof kept);
  return kept;
}

// One row after another: a whole vector may be written over the beginning of the next one's.
static void images_from(const MaskedImages& p, int64_t from, int64_t to) {
  constexpr int L = VL<float>;
  const any_f32* w = static_cast<const any_f32*>(p.w);
  float* const end = p.y + to * p.taps;
  for (int64_t row = from; row < to; ++row) {
    const any_f32* coefficients = w + row * p.images;
    const uint8_t* live = p.live + row * p.images;
    for (int64_t t = 0; t < p.taps; t += L) {
      vec_f32 sum = {};
      for (int64_t u = 0; u < p.images; ++u)
        sum += kept_if(coefficients + u, live[u]) * load(p.image + u * p.stride + t);
      float* to_here = p.y + row * p.taps + t;
      if (to_here + L <= end)
        std::memcpy(to_here, &sum, sizeof sum);
      else
        std::memcpy(to_here, &sum, size_t(least<int64_t>(L, p.taps - t)) * sizeof(float));
    }
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv

#define HETCONV_MASK_LOOPS                                                                       \
  MaskLoops {                                                                                    \
    {HETCONV_NS::mask_from<HETCONV_NS::any_u16>, HETCONV_NS::mask_from<HETCONV_NS::any_u32>,     \
     HETCONV_NS::mask_from<HETCONV_NS::any_u64>},                                                \
        {HETCONV_NS::turn_from<HETCONV_NS::any_u16>, HETCONV_NS::turn_from<HETCONV_NS::any_u32>, \
         HETCONV_NS::turn_from<HETCONV_NS::any_u64>},                                            \
        HETCONV_NS::multiply_masked, HETCONV_NS::images_from                                     \
  }
