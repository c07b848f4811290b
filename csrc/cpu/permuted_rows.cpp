// SPDX-License-Identifier: Apache-2.0
#include "permuted_rows.h"

namespace hetconv {

PermutedRows rows_of(PermutedTaps taps, const std::vector<size_t>& again) {
  PermutedRows rows;
  std::vector<size_t> twins, apart = again;
  for (auto& [reads, at] : taps)
    while (!at.empty()) {
      const auto first = at.begin();
      const auto second = at.find(first->first + 1), third = at.find(first->first + 2);
      const bool triple = second != at.end() && third != at.end(), twin = third != at.end();
      std::vector<size_t>& to = triple ? rows.order : twin ? twins : apart;
      to.push_back(first->second);
      if (triple) to.push_back(second->second), at.erase(second);
      if (twin) to.push_back(third->second), at.erase(third);
      at.erase(first);
    }
  rows.triples = int(rows.order.size() / 3);
  rows.twins = int(twins.size() / 2);
  rows.order.insert(rows.order.end(), twins.begin(), twins.end());
  rows.order.insert(rows.order.end(), apart.begin(), apart.end());
  return rows;
}

}  // namespace hetconv
