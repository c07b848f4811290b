// SPDX-License-Identifier: Apache-2.0
// Tiles of P pixels x 8 filters in plain C++.
#pragma once
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kInt8Units = 1;
constexpr int kInt8Pixels[kInt8Units + 1] = {0, 4};

template <int P, int U> static void int8_tile(const Int8Tile& t, const Finish& f) {
  static_assert(U == 1, "one unit");
  int32_t sums[P][kUnit];
  for (int p = 0; p < P; ++p) memcpy(sums[p], t.bias, sizeof sums[p]);
  const int8_t* w = t.w;
  for (int k = 0; k < t.quads; ++k, w += kUnit * kQuad)
    for (int p = 0; p < P; ++p) {
      const uint8_t* x = t.a + t.off[k] + p * t.pitch;
      for (int l = 0; l < kUnit; ++l)
        for (int j = 0; j < kQuad; ++j) sums[p][l] += int(x[j]) * w[l * kQuad + j];
    }
  for (int k = t.quads; k < t.quads + t.shuffles; ++k, w += 2 * kUnit * kQuad)
    for (int p = 0; p < P; ++p) {
      const uint8_t* x = t.a + t.off[k] + p * t.pitch;
      for (int l = 0; l < kUnit; ++l)
        for (int j = 0; j < kQuad; ++j) {
          const uint8_t pick = uint8_t(w[l * kQuad + j]);
          if (pick < kWindow) sums[p][l] += int(x[pick]) * w[(kUnit + l) * kQuad + j];
        }
    }
  for (int p = 0; p < P; ++p)
    for (int l = 0; l < kUnit; ++l) {
      if (t.sums) {
        t.sums[p * kUnit + l] = sums[p][l];
        continue;
      }
      float v = float(sums[p][l]) * t.multiplier[l];
      if (t.res) v = v + residual_of(f, t.res[p * t.res_pitch + l]);
      t.y[p * t.y_pitch + l] = byte_of(f, v);
    }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
