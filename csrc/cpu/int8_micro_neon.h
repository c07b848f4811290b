// SPDX-License-Identifier: Apache-2.0
// Tiles of P pixels x U vectors of 8 filters on aarch64 with the dot-product extension (asimddp).
//
// sdot multiplies signed bytes with signed ones: an activation x counts as x - 128 here, and its
// zero point as 128 less (Int8Kernels::signed_bytes).
#pragma once
#include <arm_neon.h>
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kInt8Units = 2;
constexpr int kInt8Pixels[kInt8Units + 1] = {0, 8, 5};

// Eight filters: two vectors of four sums.
struct Eight {
  int32x4_t v[2];
};
struct Quads {
  int8x16_t v[2];
};
HC_INLINE Quads quads_at(const int8_t* w) { return {{vld1q_s8(w), vld1q_s8(w + 16)}}; }
HC_INLINE Eight dot(Eight sum, int8x16_t x0, int8x16_t x1, const Quads& w) {
  return {{vdotq_s32(sum.v[0], w.v[0], x0), vdotq_s32(sum.v[1], w.v[1], x1)}};
}
HC_INLINE int8x16_t as_signed(uint8x16_t x) {
  return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(0x80)));
}

template <bool residual>
HC_INLINE void finish8(const Finish& f, const Eight& sums, const float* multiplier,
                       const uint8_t* res, uint8_t* y) {
  int16x4_t halves[2];
  const uint8x8_t flipped = residual ? veor_u8(vld1_u8(res), vdup_n_u8(f.res_flip)) : vdup_n_u8(0);
  const uint16x8_t wide = vmovl_u8(flipped);
  HC_UNROLL for (int i = 0; i < 2; ++i) {
    float32x4_t t = vmulq_f32(vcvtq_f32_s32(sums.v[i]), vld1q_f32(multiplier + 4 * i));
    if (residual) {
      const uint32x4_t r = vmovl_u16(i ? vget_high_u16(wide) : vget_low_u16(wide));
      const int32x4_t q = vsubq_s32(vreinterpretq_s32_u32(r), vdupq_n_s32(f.res_zero));
      t = vaddq_f32(t, vmulq_f32(vcvtq_f32_s32(q), vdupq_n_f32(f.res_multiplier)));
    }
    t = vminq_f32(vmaxq_f32(t, vdupq_n_f32(-f.bound)), vdupq_n_f32(f.bound));
    halves[i] = vqmovn_s32(vaddq_s32(vcvtnq_s32_f32(t), vdupq_n_s32(f.zero)));
  }
  uint8x8_t q = vqmovun_s16(vcombine_s16(halves[0], halves[1]));
  q = vmin_u8(vmax_u8(q, vdup_n_u8(f.least_byte)), vdup_n_u8(f.greatest_byte));
  vst1_u8(y, veor_u8(q, vdup_n_u8(f.flip)));
}

template <int P, int U> static void int8_tile(const Int8Tile& t, const Finish& f) {
  constexpr int lanes = U * kUnit, step = lanes * kQuad;
  Eight acc[P][U];
  HC_UNROLL for (int p = 0; p < P; ++p) HC_UNROLL for (int u = 0; u < U; ++u) acc[p][u] =
      Eight{{vld1q_s32(t.bias + 8 * u), vld1q_s32(t.bias + 8 * u + 4)}};
  const int8_t* w = t.w;
  for (int k = 0; k < t.quads; ++k, w += step) {
    const uint8_t* a = t.a + t.off[k];
    Quads b[U];
    HC_UNROLL for (int u = 0; u < U; ++u) b[u] = quads_at(w + 32 * u);
    HC_UNROLL for (int p = 0; p < P; ++p) {
      uint32_t four;
      memcpy(&four, a + p * t.pitch, 4);
      const int8x16_t x = as_signed(vreinterpretq_u8_u32(vdupq_n_u32(four)));
      HC_UNROLL for (int u = 0; u < U; ++u) acc[p][u] = dot(acc[p][u], x, x, b[u]);
    }
  }
  for (int k = t.quads; k < t.quads + t.shuffles; ++k, w += 2 * step) {
    const uint8_t* a = t.a + t.off[k];
    HC_UNROLL for (int p = 0; p < P; ++p) {
      const uint8x16_t window = vld1q_u8(a + p * t.pitch);
      HC_UNROLL for (int u = 0; u < U; ++u) {
        // A pick of 0x80 gives 0, whose weight is 0 too: as a signed activation it is -128 times 0.
        const uint8_t* picks = reinterpret_cast<const uint8_t*>(w) + 32 * u;
        const int8x16_t x0 = as_signed(vqtbl1q_u8(window, vld1q_u8(picks))),
                        x1 = as_signed(vqtbl1q_u8(window, vld1q_u8(picks + 16)));
        acc[p][u] = dot(acc[p][u], x0, x1, quads_at(w + step + 32 * u));
      }
    }
  }
  HC_UNROLL for (int p = 0; p < P; ++p) HC_UNROLL for (int u = 0; u < U; ++u) {
    if (t.sums) {
      int32_t* at = t.sums + p * lanes + 8 * u;
      vst1q_s32(at, acc[p][u].v[0]);
      vst1q_s32(at + 4, acc[p][u].v[1]);
      continue;
    }
    uint8_t* y = t.y + p * t.y_pitch + 8 * u;
    if (t.res)
      finish8<true>(f, acc[p][u], t.multiplier + 8 * u, t.res + p * t.res_pitch + 8 * u, y);
    else
      finish8<false>(f, acc[p][u], t.multiplier + 8 * u, nullptr, y);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
