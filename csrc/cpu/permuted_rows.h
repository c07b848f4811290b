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
using PermutedTaps = std::map<std::vector<int64_t>, std::map<int, size_t>>;
// The same in the order of a segment: first `triples` times three taps of a kernel row, kx to
// kx + 2, then `twins` times two, kx and kx + 2, then what is left.
struct PermutedRows {
  std::vector<size_t> order;
  int triples = 0, twins = 0;
};
// again: columns that read at a tap what another one of it reads too.
PermutedRows rows_of(PermutedTaps taps, const std::vector<size_t>& again);

}  // namespace hetconv
