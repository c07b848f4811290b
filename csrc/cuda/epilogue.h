// SPDX-License-Identifier: Apache-2.0
// The epilogue's activations: of float32 numbers, or of two that are rounded to 16 bits.
#pragma once
#include "narrow.h"
#include "ptx.h"

namespace hetconv::cuda {

// The piecewise linear ones are a clamp that lets NaN through, as PyTorch's do. It comes after
// rounding, of two numbers at a time: the bounds are numbers of 16 bits, and rounding keeps order.
struct Clamp {
  float low, high;
  __device__ explicit Clamp(Act act)
      : low(act == Act::none ? -INFINITY : 0.0f), high(act == Act::relu6 ? 6.0f : INFINITY) {}
  // float32 is not rounded; NaN is neither below nor above.
  __device__ float of(float v) const {
    const float risen = v < low ? low : v;
    return risen > high ? high : risen;
  }
  template <class T> __device__ uint32_t pair(float first, float second) const {
    const uint32_t risen = greater_pair<T>(narrow_pair<T>(first, second), narrow_pair<T>(low, low));
    return lesser_pair<T>(risen, narrow_pair<T>(high, high));
  }
};

// Which of the two an activation is.
inline bool is_smooth(Act act) { return act == Act::silu || act == Act::gelu; }

struct Smooth {
  bool gelu;
  __device__ explicit Smooth(Act act) : gelu(act == Act::gelu) {}
  __device__ float of(float v) const {
    if (gelu) return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    return v / (1.0f + expf(-v));
  }
  template <class T> __device__ uint32_t pair(float first, float second) const {
    return narrow_pair<T>(of(first), of(second));
  }
};

}  // namespace hetconv::cuda
