// SPDX-License-Identifier: Apache-2.0
// Columns whose lanes read channels of their own: taps of a kernel row that read the same ones by
// the same permutation, so that a pixel is permuted once for them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace hetconv {

// Columns by what they read of a row of pixels, and then by kx: their numbers.
using TurnedTaps = std::map<std::vector<int64_t>, std::map<int, size_t>>;
// The same as three taps of a kernel row each, kx to kx + 2; two, kx and kx + 2; and what is left.
struct TurnedRows {
  std::vector<size_t> triples, twins, apart;
};
TurnedRows rows_of(TurnedTaps taps);

}  // namespace hetconv
