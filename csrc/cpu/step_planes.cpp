// SPDX-License-Identifier: Apache-2.0
// Steps of a program whose operands lie in planes (NCHW), though they were recorded with channels
// innermost (NHWC): between steps that compute from planes of pixels nobody else looks.
#include <stdexcept>

#include "step_pieces.h"
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

std::shared_ptr<const Step> Step::in_planes(const std::array<bool, 3>&, int64_t, int, int) const {
  throw std::invalid_argument("the operands of this step lie as they were recorded");
}

std::shared_ptr<const Step> ConvStep::in_planes(const std::array<bool, 3>& which, int64_t N, int H,
                                                int W) const {
  if (lying() == Lying::fixed) return Step::in_planes(which, N, H, W);
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

// One pixel lies the same either way.
Lying PoolStep::lying() const {
  const bool known = what_ == Pooling::mean && dtype_ == DType::f32 && of_whole_image();
  return known ? Lying::either : Lying::fixed;
}

std::shared_ptr<const Step> PoolStep::in_planes(const std::array<bool, 3>& which, int64_t N, int H,
                                                int W) const {
  if (lying() == Lying::fixed || N != N_ || H != H_ || W != W_)
    return Step::in_planes(which, N, H, W);
  auto step = std::make_shared<PoolStep>(*this);
  if (which[0]) step->what_ = Pooling::mean_of_planes;
  return step;
}

// Each plane's pixels in order, as where channels are innermost; many planes at once, since a sum
// waits for the one before it.
void PoolStep::run_planes(char* const* operands, int threads) const {
  const float* x = reinterpret_cast<const float*>(operands[0]);
  float* y = reinterpret_cast<float*>(operands[1]);
  const int64_t pixels = int64_t(H_) * W_;
  constexpr int64_t kPlanes = 16;
  in_pieces(N_ * C_, kPiece / pixels, asked(threads, threads_), [&](int64_t from, int64_t to) {
    for (int64_t c0 = from; c0 < to; c0 += kPlanes) {
      const int64_t m = to - c0 < kPlanes ? to - c0 : kPlanes;
      float sums[kPlanes] = {0.0f};
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < m; ++c) sums[c] += x[(c0 + c) * pixels + i];
      for (int64_t c = 0; c < m; ++c) y[c0 + c] = sums[c] / float(pixels);
    }
  });
}

}  // namespace hetconv
