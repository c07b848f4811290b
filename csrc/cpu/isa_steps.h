// SPDX-License-Identifier: Apache-2.0
// Loops of steps between layers, for the instruction set of the object that includes this.
#pragma once
#include <cstring>

#include "steps_loops.h"

namespace hetconv {
namespace HETCONV_NS {

static inline float value_of(float v) { return v; }
static inline float value_of(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline void store(float* to, float v) { *to = v; }
// To nearest, ties to even; a NaN is the one that PyTorch makes.
static inline void store(uint16_t* to, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *to = uint16_t(v == v ? rounded : 0x7fc0);
}

// clamp: a NaN stays one.
template <class T>
static void each(Each what, const T* a, const T* b, T* y, int64_t n, float low, float high) {
  switch (what) {
    case Each::add:
      for (int64_t i = 0; i < n; ++i) store(y + i, value_of(a[i]) + value_of(b[i]));
      break;
    case Each::sub:
      for (int64_t i = 0; i < n; ++i) store(y + i, value_of(a[i]) - value_of(b[i]));
      break;
    case Each::mul:
      for (int64_t i = 0; i < n; ++i) store(y + i, value_of(a[i]) * value_of(b[i]));
      break;
    case Each::relu:
      for (int64_t i = 0; i < n; ++i) {
        const float v = value_of(a[i]);
        store(y + i, v < 0.0f ? 0.0f : v);
      }
      break;
    case Each::clamp:
      for (int64_t i = 0; i < n; ++i) {
        const float v = value_of(a[i]);
        store(y + i, v < low ? low : v > high ? high : v);
      }
      break;
    case Each::leaky_relu:
      for (int64_t i = 0; i < n; ++i) {
        const float v = value_of(a[i]);
        store(y + i, v > 0.0f ? v : v * low);
      }
      break;
  }
}

template <class T>
static void each_from(Each what, const char* a, const char* b, char* y, int64_t from, int64_t to,
                      float low, float high) {
  each(what, reinterpret_cast<const T*>(a) + from, reinterpret_cast<const T*>(b) + (b ? from : 0),
       reinterpret_cast<T*>(y) + from, to - from, low, high);
}

template <class T> static void pool_window(const T* x, Window s, int C, T* y) {
  for (int c = 0; c < C; ++c) y[c] = x[c];
  for (int i = 0; i < s.h; ++i)
    for (int j = 0; j < s.w; ++j) {
      const T* at = x + i * s.row + j * s.pixel;
      for (int c = 0; c < C; ++c) {
        const float v = value_of(at[c]), best = value_of(y[c]);
        y[c] = v > best || v != v ? at[c] : y[c];
      }
    }
}

template <class T> static void pool_from(const char* x, Window s, int C, char* y) {
  pool_window(reinterpret_cast<const T*>(x), s, C, reinterpret_cast<T*>(y));
}

// The sum of a window's pixels over a number of taps, both in float32.
template <class T> static void mean_from(const char* x, Window s, int C, float taps, char* y) {
  constexpr int kChannels = 64;  // at once
  for (int c0 = 0; c0 < C; c0 += kChannels) {
    const int m = C - c0 < kChannels ? C - c0 : kChannels;
    float sums[kChannels] = {0.0f};
    for (int i = 0; i < s.h; ++i)
      for (int j = 0; j < s.w; ++j) {
        const T* at = reinterpret_cast<const T*>(x) + i * s.row + j * s.pixel + c0;
        for (int c = 0; c < m; ++c) sums[c] += value_of(at[c]);
      }
    for (int c = 0; c < m; ++c) store(reinterpret_cast<T*>(y) + c0 + c, sums[c] / taps);
  }
}

template <class From, class To>
static void cast_from(const char* x, char* y, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i)
    store(reinterpret_cast<To*>(y) + i, value_of(reinterpret_cast<const From*>(x)[i]));
}

}  // namespace HETCONV_NS
}  // namespace hetconv

#define HETCONV_STEP_LOOPS                                                           \
  StepLoops {                                                                        \
    {HETCONV_NS::each_from<float>, HETCONV_NS::each_from<uint16_t>},                 \
        {HETCONV_NS::pool_from<float>, HETCONV_NS::pool_from<uint16_t>},             \
        {HETCONV_NS::mean_from<float>, HETCONV_NS::mean_from<uint16_t>}, {           \
      HETCONV_NS::cast_from<uint16_t, float>, HETCONV_NS::cast_from<float, uint16_t> \
    }                                                                                \
  }
