// SPDX-License-Identifier: Apache-2.0
// wgrad: with pixels in vectors (narrow and irregular groups) or with channels in vectors.
#pragma once
#include "channels_plan.h"
#include "engine.h"

namespace hetconv {

class Wgrad {
 public:
  // form: "auto", "pixels" or "channels"; "auto" expects most calls with channels innermost in
  // memory (channels_last) or not.
  Wgrad(const uint8_t* mask, int F, int C, int KH, int KW, DType dtype, const Kernels& kernels,
        const std::string& form, bool channels_last);
  Wgrad(const Wgrad&) = delete;
  Wgrad& operator=(const Wgrad&) = delete;
  // p.y is the output gradient. Writes the live entries of dw only.
  void run(Problem p, void* dw, const int64_t strides[4]) const;
  const Plan& plan() const { return plan_; }
  const char* form() const { return channels_ ? "channels" : "pixels"; }
  // Vector multiply-adds per pixel, weighted, with what packing costs.
  double cost() const { return cost_; }

 private:
  double pixels_cost() const;

  Plan plan_;
  std::unique_ptr<ChannelsPlan> channels_;
  double cost_;
};

}  // namespace hetconv
