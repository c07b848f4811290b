// SPDX-License-Identifier: Apache-2.0
// The epilogue's activations in float32.
#pragma once
#include "narrow.h"
#include "ptx.h"

namespace hetconv::cuda {

// The piecewise linear ones are a clamp that lets NaN through, as PyTorch's do.
struct Clamp {
  float low, high;
  __device__ explicit Clamp(Act act)
      : low(act == Act::none ? -INFINITY : 0.0f), high(act == Act::relu6 ? 6.0f : INFINITY) {}
  __device__ float operator()(float v) const { return lesser(greater(v, low), high); }
};

struct Smooth {
  bool gelu;
  __device__ explicit Smooth(Act act) : gelu(act == Act::gelu) {}
  __device__ float operator()(float v) const {
    if (gelu) return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    return v / (1.0f + expf(-v));
  }
};

}  // namespace hetconv::cuda
