// SPDX-License-Identifier: Apache-2.0
// What a convolution over a mask means, by seven nested loops in double precision. Compiled without
// sanitizers, and from nothing of the engine.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace driver {

// Activations and gradients are dense [N, C, H, W], weights [F, C, KH, KW].
struct Conv {
  int64_t N;
  int C, H, W, F, Ho, Wo, KH, KW;
  int sh, sw, pt, pl, dh, dw;
  std::vector<uint8_t> mask;
  int64_t weight_at(int f, int c, int ky, int kx) const {
    return ((int64_t(f) * C + c) * KH + ky) * KW + kx;
  }
};

// The sizes, strides and padding of a convolution, in the engine's problem of either kind.
template <class P> P problem_of(const Conv& v) {
  P p{};
  p.N = v.N;
  p.C = v.C;
  p.F = v.F;
  p.H = v.H;
  p.W = v.W;
  p.Ho = v.Ho;
  p.Wo = v.Wo;
  p.sh = v.sh;
  p.sw = v.sw;
  p.pt = v.pt;
  p.pl = v.pl;
  p.dh = v.dh;
  p.dw = v.dw;
  return p;
}

using Values = std::vector<double>;

Values reference_fprop(const Conv& v, const Values& x, const Values& w);
Values reference_dgrad(const Conv& v, const Values& dy, const Values& w);
Values reference_wgrad(const Conv& v, const Values& x, const Values& dy);

// How far one element of an operand reaches: into a result that reads it through a live weight, or
// only into one whose window covers it.
enum Reach : uint8_t { kNothing = 0, kWindow = 1, kRead = 2 };
std::vector<uint8_t> reach_fprop(const Conv& v, int64_t element_of_x);
std::vector<uint8_t> reach_dgrad(const Conv& v, int64_t element_of_dy);

}  // namespace driver
