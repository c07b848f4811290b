// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "int8_plan.h"

namespace hetconv {

// The filter whose sum could leave int32, whatever the activations are, or that a multiplier which
// is not finite scales; -1: there is none. `bound`: 255 * sum of |w| + |bias| of the first kind, 0
// of the second.
int int8_unfit_filter(const Int8Packed& packed, const float* multiplier, const int32_t* bias,
                      int64_t* bound);

// What each lane needs: its multiplier, and its bias with the zero point of x in it.
struct Int8Lanes {
  std::vector<float> multiplier;
  std::vector<int32_t> bias;
};
Int8Lanes int8_lanes(const Int8Packed& packed, const Int8Problem& p, const float* multiplier,
                     const int32_t* bias);

// Multipliers and biases are those of lanes.
bool int8_fprop(const Int8Packed& packed, Int8Problem p, const Int8Lanes& lanes);

// `multiplier` and `bias` per filter. False: it cannot be pooled as it is computed, and nothing was
// written.
bool int8_fprop(const Int8Packed& packed, Int8Problem p, const float* multiplier,
                const int32_t* bias);

}  // namespace hetconv
