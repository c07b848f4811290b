// SPDX-License-Identifier: Apache-2.0
// Layers of a program whose operands lie in planes (NCHW), though they were recorded with channels
// innermost (NHWC): between layers that compute from planes of pixels nobody else looks.
#include "steps.h"

namespace hetconv {
namespace {

// Dense images.
View dense(bool planes, int C, int64_t H, int64_t W) {
  if (planes) return {nullptr, C * H * W, H * W, W, 1};
  return {nullptr, H * W * C, 1, W * C, C};
}

}  // namespace

Lying ConvStep::lying() const {
  const Lowered& low = plan_->lowered();
  const bool stored = plan_->dtype() == DType::f32 || plan_->dtype() == DType::f64;
  if (!stored || p_.pool || low.winograd || low.accumulate) return Lying::fixed;
  if (low.form == Form::filters) return Lying::pixels;
  return p_.KH == 1 && p_.KW == 1 ? Lying::planes : Lying::either;
}

std::shared_ptr<const ConvStep> ConvStep::in_planes(const std::array<bool, 3>& which, int64_t N,
                                                    int H, int W) const {
  auto step = std::make_shared<ConvStep>(*this);
  Problem& p = step->p_;
  if (p.N != N || p.H != H || p.W != W) {  // a 1x1 layer, recorded as one row of pixels
    p.N = N;
    p.H = p.Ho = H;
    p.W = p.Wo = W;
  }
  p.x = dense(which[0], p.C, p.H, p.W);
  if (p.res.sc) p.res = dense(which[1], p.F, p.Ho, p.Wo);  // else there is none
  p.y = dense(which[2], p.F, p.Ho, p.Wo);
  return step;
}

}  // namespace hetconv
