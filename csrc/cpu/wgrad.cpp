// SPDX-License-Identifier: Apache-2.0
#include "wgrad.h"

#include <algorithm>

namespace hetconv {

Wgrad::Wgrad(const uint8_t* mask, int F, int C, int KH, int KW, DType dtype, const Kernels& kernels,
             const std::string& form, bool channels_last)
    : plan_(mask, F, C, KH, KW, dtype, kernels, "pixels", channels_last), cost_(pixels_cost()) {
  // Bands by vectors are wider: the window of one pixel must leave room in the workspace.
  const size_t window = size_t(C) * KH * KW * plan_.accumulator_bytes();
  if (form == "pixels" || window > kWorkspaceBytes / 2) return;
  auto channels = std::make_unique<ChannelsPlan>(plan_);
  const double cost = channels->cost(channels_last);
  if (form == "auto" && cost_ <= cost) return;
  channels_ = std::move(channels);
  cost_ = cost;
}

// Vectors of pixels: loads and sums of a tile, then its sums are folded.
double Wgrad::pixels_cost() const {
  const Lowered& low = plan_.lowered();
  double total = 0.7 * (low.nlive + low.F);
  for (int t = 0; t < low.count; ++t) {
    const PixelTile& k = low.tiles[t];
    const int limit = plan_.kernels().wgrad_columns[k.nf], parts = (k.ncols + limit - 1) / limit;
    total += (std::max(1.3 * k.nf * k.ncols, double(k.nf) * parts + k.ncols)) / low.vl;
  }
  return total;
}

void Wgrad::run(Problem p, void* dw, const int64_t strides[4]) const {
  p.threads = usable_threads(p.threads);
  if (p.Ho < 0 || p.Wo < 0) p.Ho = p.Wo = 0;
  forget_idle_strides(&p);
  const Kernels& kernels = plan_.kernels();
  const int type = int(plan_.dtype());
  if (channels_) return kernels.wgrad_channels[type](channels_->lowered(), p, dw, strides);
  const OffsetUse use(plan_.offsets());
  kernels.wgrad_pixels[type](plan_.lowered(), use.cache, p, dw, strides);
}

}  // namespace hetconv
