// SPDX-License-Identifier: Apache-2.0
// dgrad is fprop on the transposed, tap-flipped Support; with a stride, one such fprop for each
// residue class of the input.
#pragma once
#include "engine.h"

namespace hetconv {

// Taps k with (r + pad - dilation * k) % stride == 0 are k0, k0 + step, ...; input r + stride * m
// reads output m + first - j * spread with its j-th tap.
struct Residue {
  int r, k0, step, count, first, spread;
};

class Dgrad {
 public:
  struct Part {
    Residue y, x;
    std::unique_ptr<Plan> plan;
  };
  Dgrad(const uint8_t* mask, int F, int C, int KH, int KW, DType dtype, const Kernels& kernels,
        const std::string& form, bool channels_last, const int stride[2], const int padding[2],
        const int dilation[2]);
  Dgrad(const Dgrad&) = delete;
  Dgrad& operator=(const Dgrad&) = delete;
  // weight: the layer's own, [F, C, KH, KW] by strides.
  std::vector<std::unique_ptr<Packed>> pack(const WeightView& weight, DType from,
                                            int threads) const;
  // dy [N, F, Ho, Wo] to dx [N, C, H, W]; every element of dx is written.
  void run(const std::vector<std::unique_ptr<Packed>>& packed, const View& dy, int64_t N, int Ho,
           int Wo, const View& dx, int H, int W, int threads) const;
  const std::vector<Part>& parts() const { return parts_; }
  DType dtype() const { return dtype_; }

 private:
  int F_, C_, stride_[2];
  DType dtype_;
  std::vector<Part> parts_;
};

}  // namespace hetconv
