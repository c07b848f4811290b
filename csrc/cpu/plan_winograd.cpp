// SPDX-License-Identifier: Apache-2.0
// Winograd's forms: which channels are transformed together, and which filters read them.
#include <algorithm>
#include <stdexcept>

#include "plan.h"

namespace hetconv {

// Cost of the products of two vectors of filters, and of one, as in filters_cost. Of a vector of
// channels or filters, the transformations of one output. Measured on Zen 4.
// kNarrowTransformCost: beside products of bfloat16.
constexpr double kProductCost = 1.0, kAloneProductCost = 1.03, kPairProductCost = 1.15,
                 kTransformCost = 11, kNarrowTransformCost = 20;

// The vectors of VL neighbouring channels that hold all those marked, none beyond `padded`.
static std::vector<int> cover(const std::vector<uint8_t>& needed, int padded, int vl) {
  std::vector<int> from;
  for (int c = 0; c < int(needed.size()); ++c)
    if (needed[c] && (from.empty() || c >= from.back() + vl))
      from.push_back(std::min(c, padded - vl));
  return from;
}

// The place of a channel in a transformed tile; -1 if it is not there.
static int place_of(const std::vector<int>& from, int c, int vl) {
  for (size_t i = from.size(); i-- > 0;)
    if (c >= from[i] && c < from[i] + vl) return int(i) * vl + c - from[i];
  return -1;
}

// Moves the channels of a filter with all nine taps out of the mask; false: there is none.
bool Plan::take_whole_channels() {
  const int F = low_.F, C = low_.C;
  whole_.assign(size_t(F) * C, 0);
  bool any = false;
  for (size_t i = 0; i < whole_.size(); ++i) {
    uint8_t* taps = mask_.data() + i * 9;
    whole_[i] = std::all_of(taps, taps + 9, [](uint8_t t) { return t != 0; });
    if (!whole_[i]) continue;
    any = true;
    std::fill(taps, taps + 9, uint8_t(0));
  }
  for (Group& g : groups_) {
    const uint8_t* whole = whole_.data() + size_t(g.filters[0]) * C;
    g.columns.erase(std::remove_if(g.columns.begin(), g.columns.end(),
                                   [&](const Column& c) { return whole[c.channel] != 0; }),
                    g.columns.end());
  }
  return any;
}

// Takes all phases of the channels that filters read, which must be the same for all of them;
// false: they are not.
bool Plan::take_phases(int tile) {
  if (groups_.size() != 1 || groups_[0].columns.empty()) return false;
  const int P = phases(tile);
  whole_.assign(size_t(low_.F) * size_t(P * P * low_.C), 0);
  for (const Column& c : groups_[0].columns)
    for (int f = 0; f < low_.F; ++f)
      whole_[(size_t(f) * P * P + size_t(c.ky % P * P + c.kx % P)) * low_.C + c.channel] = 1;
  groups_[0].columns.clear();
  return true;
}

void Plan::lower_winograd(int tile) {
  const int P = phases(tile), vl = low_.vl, C = P * P * low_.C;
  const bool kernels = (low_.KH + P - 1) / P == taps(tile) && (low_.KW + P - 1) / P == taps(tile);
  const bool dtype = dtype_ == DType::f32 || (pairs() && tile == 2);
  if (!kernels || !dtype || low_.F < vl || (P == 1 && C < vl))
    throw std::invalid_argument(
        P == 1 ? "Winograd's forms of tiles of 2x2 and 4x4 outputs are for 3x3 kernels in float32, "
                 "that of 2x2 for bfloat16 too where the processor multiplies it, with a vector of "
                 "channels and of filters"
               : "Winograd's form of tiles of 3x3 outputs is for 7x7 and 8x8 kernels in float32, "
                 "with a vector of filters");
  if (P == 1 && !take_whole_channels())
    throw std::invalid_argument("Winograd's forms need channels with all nine taps");
  if (P > 1 && !take_phases(tile))
    throw std::invalid_argument(
        "Winograd's form of tiles of 3x3 outputs needs filters that read the same inputs");
  winograd_.tile = tile;
  lower_filters();
  winograd_.channels = C;
  const int padded = (C + vl - 1) / vl * vl;

  // Which channels each vector of a segment reads. Vectors of a segment that read the same ones are
  // one part.
  std::vector<std::vector<uint8_t>> reads;
  part0_.assign(1, 0);
  const int count = int(pairs() ? paired_.size() : segments_.size());
  for (int s = 0; s < count; ++s) {
    const int lanes = pairs() ? paired_[s].lanes : segments_[s].lanes,
              filter0 = pairs() ? paired_[s].filter0 : segments_[s].filter0;
    for (int j = 0; j * vl < lanes; ++j) {
      std::vector<uint8_t> needed(C, 0);
      for (int l = j * vl; l < std::min(lanes, (j + 1) * vl); ++l)
        for (int c = 0; c < C; ++c) needed[c] |= whole_[size_t(filters_[filter0 + l]) * C + c];
      if (std::find(needed.begin(), needed.end(), 1) == needed.end()) continue;
      if (j == 1 && int(parts_.size()) > part0_[s] && reads.back() == needed) {
        parts_.back().nv = 2;
        continue;
      }
      parts_.push_back(WinogradPart{s, j, 1, -1, 0, 0, 0, 0, 0});
      reads.push_back(needed);
    }
    part0_.push_back(int(parts_.size()));
  }

  // A unit for each set of channels, or one of all where the sets overlap.
  std::vector<std::vector<int>> units;
  std::vector<uint8_t> all(C, 0);
  size_t apart = 0;
  std::vector<int> unit_of;
  for (const auto& needed : reads) {
    for (int c = 0; c < C; ++c) all[c] |= needed[c];
    const std::vector<int> from = cover(needed, padded, vl);
    const auto found = std::find(units.begin(), units.end(), from);
    unit_of.push_back(int(found - units.begin()));
    if (found == units.end()) {
      units.push_back(from);
      apart += from.size();
    }
  }
  const std::vector<int> together = cover(all, padded, vl);
  if (4 * apart > 5 * together.size()) {
    units.assign(1, together);
    std::fill(unit_of.begin(), unit_of.end(), 0);
  }
  for (const auto& from : units) {
    units_.push_back(WinogradUnit{int(from_.size()), int(from.size())});
    from_.insert(from_.end(), from.begin(), from.end());
    winograd_.widest = std::max(winograd_.widest, int(from.size()));
  }
  for (size_t k = 0; k < parts_.size(); ++k) {
    parts_[k].unit = unit_of[k];
    std::vector<int> places;
    for (int c = 0; c < C; ++c)
      if (reads[k][c]) places.push_back(place_of(units[unit_of[k]], c, vl));
    std::sort(places.begin(), places.end());
    add_places(parts_[k], places);
  }
}

void Plan::add_places(WinogradPart& p, const std::vector<int>& places) {
  p.off0 = int64_t(wino_offsets_.size());
  p.w0 = low_.packed;
  const size_t n = places.size();
  const bool quads = pairs() || p.nv == 2 || kernels_.half_vectors;
  std::vector<int> singles;
  std::vector<uint8_t> taken;  // of singles
  for (size_t i = 0; i < n;) {
    const auto neighbours = [&](size_t count) {
      return i + count <= n && places[i + count - 1] == places[i] + int(count) - 1;
    };
    const size_t together = pairs() ? 8 : 4;
    if (quads && neighbours(together)) {
      wino_offsets_.push_back(places[i]);
      wino_taken_.push_back(kLower | kUpper);
      ++p.quads;
      i += together;
      continue;
    }
    // A place without a partner is read with a neighbour, whose weight is zero.
    const bool pair = pairs() || !quads, two = pair && neighbours(2),
               last = pair && !two && places[i] % low_.vl == low_.vl - 1;
    singles.push_back(places[i] - last);
    taken.push_back(uint8_t(two ? kLower | kUpper : last ? kUpper : kLower));
    (quads ? p.singles : p.pairs) += 1;
    i += two ? 2 : 1;
  }
  wino_offsets_.insert(wino_offsets_.end(), singles.begin(), singles.end());
  wino_taken_.insert(wino_taken_.end(), taken.begin(), taken.end());
  low_.packed += int64_t(positions(winograd_.tile)) * (quads ? p.nv : 2) * low_.vl *
                 (4 * p.quads + p.singles + p.pairs);
}

double Plan::winograd_cost() const {
  const int tile = winograd_.tile;
  const double products = double(positions(tile)) / (tile * tile),
               transform = pairs() ? kNarrowTransformCost : kTransformCost;
  double total = 0;
  for (const WinogradPart& p : parts_) {
    const double column = pairs() || p.nv == 2 ? p.nv * kProductCost : kAloneProductCost;
    total += products * (column * (4 * p.quads + p.singles) + 2 * kPairProductCost * p.pairs) +
             transform * p.nv;
  }
  for (const WinogradUnit& u : units_) total += transform * u.vectors;
  return total;
}

}  // namespace hetconv
