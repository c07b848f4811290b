// SPDX-License-Identifier: Apache-2.0
// Shuffled steps of a kernel row: which of them share what they pick.
#include <algorithm>
#include <utility>

#include "int8_plan.h"

namespace hetconv {

// Puts shuffled steps that pick the same in a kernel row side by side, and what they pick.
void Int8Plan::share_rows(Lowering& to, Int8Block& b, std::vector<Int8Step>& steps) const {
  if (low_.span) return;
  const size_t wide = size_t(b.lanes) * kQuad;
  const auto picks = to.picks.begin() + b.picks0;
  PermutedTaps taps;
  std::vector<size_t> again;  // again: a tap that picks the same once more
  for (size_t i = 0; i < steps.size(); ++i) {
    std::vector<int64_t> reads = {steps[i].ky, steps[i].at};
    reads.insert(reads.end(), picks + int64_t(i * wide), picks + int64_t((i + 1) * wide));
    if (!taps[reads].emplace(steps[i].kx, i).second) again.push_back(i);
  }
  const PermutedRows rows = rows_of(std::move(taps), again);
  b.triples = rows.triples;
  b.twins = rows.twins;
  const std::vector<Int8Step> before = steps;
  const std::vector<uint8_t> picked(picks, to.picks.end());
  for (size_t i = 0; i < rows.order.size(); ++i) {
    steps[i] = before[rows.order[i]];
    std::copy_n(picked.begin() + int64_t(rows.order[i] * wide), wide, picks + int64_t(i * wide));
  }
}

}  // namespace hetconv
