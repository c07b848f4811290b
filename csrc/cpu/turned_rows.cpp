// SPDX-License-Identifier: Apache-2.0
#include "turned_rows.h"

namespace hetconv {

TurnedRows rows_of(TurnedTaps taps) {
  TurnedRows rows;
  for (auto& [reads, at] : taps)
    while (!at.empty()) {
      const auto first = at.begin();
      const auto second = at.find(first->first + 1), third = at.find(first->first + 2);
      const bool triple = second != at.end() && third != at.end(), twin = third != at.end();
      std::vector<size_t>& to = triple ? rows.triples : twin ? rows.twins : rows.apart;
      to.push_back(first->second);
      if (triple) to.push_back(second->second), at.erase(second);
      if (twin) to.push_back(third->second), at.erase(third);
      at.erase(first);
    }
  return rows;
}

}  // namespace hetconv
