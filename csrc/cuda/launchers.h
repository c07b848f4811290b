// SPDX-License-Identifier: Apache-2.0
// What launchers share: which kernel numbers of a type take, and how many blocks a head has.
#pragma once
#include <algorithm>
#include <cstdint>

#include "narrow.h"
#include "ptx.h"

namespace hetconv::cuda {

// Picks the kernel that `of` has for a type of 16 bits, which it is given as a tag; null for other
// types.
template <class Of> auto pick_by_type(DType dtype, Of of) -> decltype(of(Half())) {
  if (dtype == DType::bf16) return of(Bfloat());
  return dtype == DType::f16 ? of(Half()) : nullptr;
}

// The blocks of each head, of those that the device holds at once. Rounded down: blocks of a second
// wave, each with a whole share of the tiles, double the time.
inline int64_t blocks_of_head(int64_t held, int64_t heads) {
  return held ? std::max<int64_t>(held / heads, 1) : 0;
}

}  // namespace hetconv::cuda
