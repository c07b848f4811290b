// SPDX-License-Identifier: Apache-2.0
// Weights in the order in which a plan's blocks read them.
#include <cstdlib>
#include <cstring>
#include <new>

#include "engine.h"
#include "int8_plan.h"
#include "memory.h"
#include "threads.h"

namespace hetconv {

Int8Packed::Int8Packed(std::shared_ptr<const Int8Plan> plan, const int8_t* w,
                       const int64_t* strides, int threads)
    : plan_(std::move(plan)), bytes_(0), data_(nullptr, std::free) {
  const Int8Lowered& low = plan_->lowered();
  bytes_ = (size_t(low.packed) + 2 * 64) / 64 * 64;
  data_.reset(allocate(bytes_));
  int8_t* packed = static_cast<int8_t*>(data_.get());
  sums_.assign(size_t(low.F), 0);
  reach_.assign(size_t(low.F), 0);
  const int C = low.C;
  each_in_parallel(low.tiles, usable_threads(threads), [&](int64_t i) {
    const Int8PixelTile& t = low.tile[i];
    const int* channels = low.channels + low.gather[t.gather].channel0;
    int8_t* to = packed + t.w0;
    for (int s = 0; s < t.steps; ++s) {
      const Int8Step& step = low.steps[t.step0 + s];
      for (int l = 0; l < t.filters; ++l)
        for (int j = 0; j < kQuad; ++j) {
          const int f = low.filters[t.filter0 + l], c = channels[kQuad * step.at + j];
          const int8_t value =
              step.own >> j & 1
                  ? w[f * strides[0] + c * strides[1] + step.ky * strides[2] + step.kx * strides[3]]
                  : int8_t(0);
          *to++ = value;
          sums_[size_t(f)] += value;
          reach_[size_t(f)] += value < 0 ? -int(value) : int(value);
        }
    }
  });
  each_in_parallel(low.blocks, usable_threads(threads), [&](int64_t i) {
    const Int8Block& b = low.block[i];
    const Int8Order& o = low.order[b.order];
    int8_t* to = packed + b.w0;
    const uint8_t* picks = low.picks + b.picks0;
    for (int s = 0; s < b.quads + b.shuffles; ++s) {
      const Int8Step& step = low.steps[b.step0 + s];
      const bool shuffled = s >= b.quads;
      if (shuffled) {
        std::memcpy(to, picks, size_t(b.lanes) * kQuad);
        to += b.lanes * kQuad;
      }
      for (int l = 0; l < b.lanes; ++l)
        for (int j = 0; j < kQuad; ++j) {
          const int f = low.filters[b.filter0 + l];
          int8_t value = 0;
          const int pick = shuffled ? picks[l * kQuad + j] : j;
          if (f >= 0 && (shuffled ? pick < 0x80 : (step.own >> j & 1))) {
            int at = step.at + pick, kx = step.kx;
            if (low.span) {
              kx += at / C;
              at %= C;
            }
            const int c = o.identity ? at : low.channels[o.channel0 + at];
            if (low.mask[((size_t(f) * C + c) * low.KH + step.ky) * low.KW + kx]) {
              value = w[f * strides[0] + c * strides[1] + step.ky * strides[2] + kx * strides[3]];
              sums_[size_t(f)] += value;
              reach_[size_t(f)] += value < 0 ? -int(value) : int(value);
            }
          }
          to[l * kQuad + j] = value;
        }
      to += b.lanes * kQuad;
      if (shuffled) picks += b.lanes * kQuad;
    }
  });
  std::memset(packed + low.packed, 0, bytes_ - size_t(low.packed));
}

}  // namespace hetconv
