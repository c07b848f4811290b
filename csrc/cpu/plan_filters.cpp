// SPDX-License-Identifier: Apache-2.0
// Filters in vectors: which filters share vectors, and how each of their columns is read.
#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "plan.h"

namespace hetconv {

// Cost of one vector multiply-add with an operand that is a broadcast for one vector only, a vector
// of activations, a permuted one, or one that is permuted for a row of taps; a broadcast shared by
// two vectors costs 1. The same for half of a pair, of one load for both halves and of one load
// each.
struct ColumnCosts {
  double split, straight, permuted, row, pair, half;
};
// Measured on Zen 5; and set for Zen 4 by layers of 16 and 48 channels: there loads of one element
// never keep a multiply-add waiting, and pairs gain nothing. The other three are Zen 5's.
constexpr ColumnCosts kWholeCosts = {1.33, 1.2, 2.0, 1.15, 1.05, 1.33},
                      kHalfCosts = {1.0, 1.2, 2.0, 1.15, 1.3, 1.33};
static const ColumnCosts& costs_on(const Kernels& kernels) {
  return kernels.half_vectors ? kHalfCosts : kWholeCosts;
}
// Cost of one output that goes to memory alone, because the filters of its vector are not
// neighbours there.
constexpr double kScatterCost = 11;

void Plan::perm_push(int64_t v) {
  if (dtype_ == DType::f64)
    perms64_.push_back(v);
  else
    perms32_.push_back(int32_t(v));
}

// The place in its window that lane l of a column reads.
static int64_t permuted_from(const LaneColumn& lane, size_t l) {
  return lane.channels[l] >= 0 ? lane.channels[l] - lane.window.channel : 0;
}

// By tap, then channel.
static bool operator<(const Column& a, const Column& b) {
  return std::tie(a.ky, a.kx, a.channel) < std::tie(b.ky, b.kx, b.channel);
}
static bool operator==(const Column& a, const Column& b) { return !(a < b) && !(b < a); }

// Moves neighbouring channels of one tap from columns, which are in order, to pairs.
static void pair_up(std::vector<Column>* columns, std::vector<Column>* pairs) {
  std::vector<Column> rest;
  for (size_t i = 0; i < columns->size(); ++i) {
    const Column& a = (*columns)[i];
    const bool two = i + 1 < columns->size() && (*columns)[i + 1].ky == a.ky &&
                     (*columns)[i + 1].kx == a.kx && (*columns)[i + 1].channel == a.channel + 1;
    (two ? pairs : &rest)->push_back(a);
    i += two;
  }
  columns->swap(rest);
}

// Lanes of a wide group fill whole vectors; groups narrower than a vector share one, each with its
// own lane columns.
void Plan::lower_filters() {
  if (pairs()) return lower_pairs();
  clear();
  low_.form = Form::filters;
  const int vl = low_.vl;
  std::vector<int> narrow,
      single;  // filters of groups below a vector; blocks of exactly one vector
  for (const Group& g : groups_) {
    const int n = int(g.filters.size());
    if (n < vl && groups_.size() > 1) {
      narrow.insert(narrow.end(), g.filters.begin(), g.filters.end());
      continue;
    }
    for (int i = 0; i < n; i += 2 * vl) {
      const std::vector<int> block(g.filters.begin() + i,
                                   g.filters.begin() + std::min(n, i + 2 * vl));
      if (int(block.size()) == vl && groups_.size() > 1)
        single.insert(single.end(), block.begin(), block.end());
      else
        add_segment(block, &g);
    }
  }
  for (size_t i = 0; i < single.size(); i += 2 * size_t(vl))
    add_segment(
        std::vector<int>(single.begin() + i, single.begin() + std::min(single.size(), i + 2 * vl)),
        nullptr);
  std::sort(narrow.begin(), narrow.end());
  for (size_t i = 0; i < narrow.size(); i += 2 * size_t(vl))
    add_segment(
        std::vector<int>(narrow.begin() + i, narrow.begin() + std::min(narrow.size(), i + 2 * vl)),
        nullptr);
}

void Plan::add_segment(const std::vector<int>& filters, const Group* group) {
  const int vl = low_.vl;
  FilterSegment s{};
  s.lanes = int(filters.size());
  s.nv = (s.lanes + vl - 1) / vl;
  s.filter0 = int(filters_.size());
  s.contiguous = 1;
  for (int l = 0; l < s.lanes; ++l) s.contiguous &= filters[l] == filters[0] + l;
  s.merged = group == nullptr;
  s.col0 = int64_t(columns_.size());
  s.w0 = low_.packed;
  s.perm0 = int64_t(dtype_ == DType::f64 ? perms64_.size() : perms32_.size());
  s.taken0 = int64_t(taken_.size());
  filters_.insert(filters_.end(), filters.begin(), filters.end());

  SegmentColumns found;
  if (group)
    found.broadcast = group->columns;
  else
    add_lane_columns(s, filters, found);
  const ColumnCosts& costs = costs_on(kernels_);
  if (s.nv == 1 && costs.pair < costs.split) pair_up(&found.broadcast, &found.pairs[0]);

  const std::vector<Column>& broadcast = found.broadcast;
  std::vector<Column> singles;
  for (size_t i = 0; i < broadcast.size();) {
    const Column& a = broadcast[i];
    bool quad = i + 3 < broadcast.size();
    for (size_t k = 1; quad && k < 4; ++k) {
      const Column& b = broadcast[i + k];
      quad = b.ky == a.ky && b.kx == a.kx && b.channel == a.channel + int(k);
    }
    if (quad)
      columns_.push_back(a);
    else
      singles.push_back(a);
    s.quads += quad;
    i += quad ? 4 : 1;
  }
  s.singles = int(singles.size());
  columns_.insert(columns_.end(), singles.begin(), singles.end());
  columns_.insert(columns_.end(), found.split.begin(), found.split.end());
  s.split = int(found.split.size()) / s.nv;
  for (int j = 0; j < s.nv; ++j) {
    s.pairs[j] = int(found.pairs[j].size());
    s.halves[j] = int(found.halves[j].size()) / 2;
    columns_.insert(columns_.end(), found.pairs[j].begin(), found.pairs[j].end());
    columns_.insert(columns_.end(), found.halves[j].begin(), found.halves[j].end());
  }

  add_lanes(s, found.lanes);
  low_.packed += int64_t(4 * s.quads + s.singles + s.split + s.straight + s.permuted) * s.nv * vl +
                 int64_t(s.paired()) * 2 * vl;
  segments_.push_back(s);
}

// Lane columns to columns_, perms and taken_: those that need no permutation come first, then taps
// of one kernel row that share theirs.
void Plan::add_lanes(FilterSegment& s, const std::vector<LaneColumn>& lanes) {
  const size_t vl = size_t(low_.vl), per = size_t(s.nv);
  // What a vector's column reads of a row of pixels: the window, then the permutation.
  const auto reads_of = [&](const LaneColumn& lane) {
    std::vector<int64_t> reads = {lane.window.channel};
    for (size_t l = 0; l < vl; ++l) reads.push_back(permuted_from(lane, l));
    return reads;
  };
  PermutedTaps taps;
  std::vector<size_t> straight, again;  // again: a tap that reads the same once more
  for (size_t q = 0; q < lanes.size() / per; ++q) {
    bool is_straight = true;
    std::vector<int64_t> reads = {lanes[q * per].window.ky};
    for (size_t j = 0; j < per; ++j) {
      const LaneColumn& lane = lanes[q * per + j];
      const std::vector<int64_t> own = reads_of(lane);
      reads.insert(reads.end(), own.begin(), own.end());
      for (size_t l = 0; l < vl; ++l) {
        const int64_t c = lane.channels[l];
        is_straight &= c < 0 || c == lane.window.channel + int64_t(l);
      }
    }
    if (is_straight)
      straight.push_back(q);
    else if (!taps[reads].emplace(lanes[q * per].window.kx, q).second)
      again.push_back(q);
  }
  const PermutedRows rows = rows_of(std::move(taps), again);
  s.straight = int(straight.size());
  s.permuted = int(rows.order.size());
  s.triples = rows.triples;
  s.twins = rows.twins;
  s.alike = 1;
  for (int i = 0; per == 2 && i < 3 * s.triples + 2 * s.twins; ++i) {
    const LaneColumn* both = &lanes[rows.order[size_t(i)] * 2];
    s.alike &= reads_of(both[0]) == reads_of(both[1]);
  }
  for (const std::vector<size_t>* part : {&std::as_const(straight), &rows.order})
    for (size_t q : *part)
      for (size_t j = 0; j < per; ++j) {
        const LaneColumn& lane = lanes[q * per + j];
        columns_.push_back(lane.window);
        for (size_t l = 0; l < vl; ++l) {
          taken_.push_back(lane.channels[l] >= 0);
          if (part != &straight) perm_push(permuted_from(lane, l));
        }
      }
}

// The channels among `columns` that some of the lanes [first, last) have, with the same tap.
std::vector<Column> Plan::read_by(const std::vector<int>& filters, int first, int last,
                                  const std::vector<Column>& columns) const {
  std::vector<Column> found;
  for (const Column& c : columns)
    for (int l = first; l < last; ++l)
      if (has(filters[l], c.channel, c.ky, c.kx)) {
        found.push_back(c);
        break;
      }
  return found;
}

// Lane columns of one vector and one tap: windows of VL channels from the first channel still
// needed, as often as the busiest lane has channels there.
std::vector<LaneColumn> Plan::lane_columns(const std::vector<int>& filters, int first, int last,
                                           const std::vector<Column>& columns) const {
  const int vl = low_.vl, C = low_.C, padded = (C + vl - 1) / vl * vl;
  std::vector<LaneColumn> found;
  std::vector<uint8_t> needed(padded, 0);
  for (const Column& c : columns) needed[c.channel] = 1;
  for (int c = 0; c < C;) {
    if (!needed[c]) {
      ++c;
      continue;
    }
    const Column window{columns[0].ky, columns[0].kx, std::min(c, padded - vl)};
    std::vector<LaneColumn> rows;
    for (int l = first; l < last; ++l) {
      // The diagonal entry first: a lane that can read its own position needs no permutation.
      size_t entry = 0;
      for (int k = 0; k < vl; ++k) {
        const int channel = window.channel + (l - first + k) % vl;
        if (channel < c || channel >= C || !needed[channel] ||
            !has(filters[l], channel, window.ky, window.kx))
          continue;
        if (rows.size() <= entry) rows.push_back({window, std::vector<int64_t>(vl, -1)});
        rows[entry++].channels[l - first] = channel;
      }
    }
    found.insert(found.end(), rows.begin(), rows.end());
    c = window.channel + vl;
  }
  return found;
}

// Pads the lists of several vectors to one length, with columns without weights, and interleaves
// them.
static void interleave(std::vector<std::vector<Column>> lists, std::vector<Column>* out) {
  size_t longest = 0;
  for (const auto& list : lists) longest = std::max(longest, list.size());
  Column idle{};
  for (const auto& list : lists)
    if (!list.empty()) idle = list[0];
  idle.idle = 1;
  for (size_t e = 0; e < longest; ++e)
    for (const auto& list : lists) out->push_back(e < list.size() ? list[e] : idle);
}

// Columns of lanes that differ, tap by tap in the kind that costs least. Lanes without a weight in
// a column hold a zero there.
void Plan::add_lane_columns(const FilterSegment& s, const std::vector<int>& filters,
                            SegmentColumns& found) const {
  const int vl = low_.vl;
  const ColumnCosts& costs = costs_on(kernels_);
  for (int ky = 0; ky < low_.KH; ++ky)
    for (int kx = 0; kx < low_.KW; ++kx) {
      std::vector<Column> all, common, rest;
      for (int c = 0; c < low_.C; ++c) all.push_back(Column{ky, kx, c});
      for (const Column& c : read_by(filters, 0, s.lanes, all)) {
        int n = 0;
        for (int f : filters) n += has(f, c.channel, ky, kx);
        (n == s.lanes ? common : rest).push_back(c);
      }
      found.broadcast.insert(found.broadcast.end(), common.begin(), common.end());
      if (rest.empty()) continue;

      std::vector<std::vector<Column>> alone, single;  // of each vector; without a neighbour
      std::vector<std::vector<LaneColumn>> own;
      std::vector<Column> pairs[2], halves[2];
      size_t most_alone = 0, most_single = 0, most_own = 0;
      double as_pairs = 0;
      bool pairable = true;
      for (int j = 0; j < s.nv; ++j) {
        const int first = std::min(s.lanes, j * vl), middle = std::min(s.lanes, first + vl / 2),
                  last = std::min(s.lanes, first + vl);
        alone.push_back(read_by(filters, first, last, rest));
        own.push_back(lane_columns(filters, first, last, alone[j]));
        std::vector<Column> low = read_by(filters, first, middle, rest),
                            high = read_by(filters, middle, last, rest);
        if (low == high) {
          pair_up(&low, &pairs[j]);
          single.push_back(low);
        } else {
          std::vector<Column> paired[2];
          pair_up(&low, &paired[0]);
          pair_up(&high, &paired[1]);
          interleave({paired[0], paired[1]}, &halves[j]);
          // A channel left over in one half may be in a pair of the other: it has no place.
          pairable = pairable && low.empty() && high.empty();
          single.emplace_back();
        }
        as_pairs +=
            (2 * costs.pair * double(pairs[j].size()) + costs.half * double(halves[j].size())) /
            s.nv;
        most_alone = std::max(most_alone, alone[j].size());
        most_single = std::max(most_single, single[j].size());
        most_own = std::max(most_own, own[j].size());
      }
      as_pairs += costs.split * double(most_single);
      // Where a row has three taps, most of them are neighbours at stride 1.
      const double as_lanes = (low_.KW < 3 ? costs.permuted : costs.row) * double(most_own),
                   as_split = costs.split * double(most_alone),
                   as_broadcast = (s.nv == 1 ? costs.split : 1.0) * double(rest.size());
      double least = std::min({as_lanes, as_split, as_broadcast});
      if (pairable) least = std::min(least, as_pairs);
      if (as_broadcast == least) {
        found.broadcast.insert(found.broadcast.end(), rest.begin(), rest.end());
      } else if (as_split == least) {
        interleave(alone, &found.split);
      } else if (pairable && as_pairs == least) {
        interleave(single, &found.split);
        for (int j = 0; j < s.nv; ++j) {
          found.pairs[j].insert(found.pairs[j].end(), pairs[j].begin(), pairs[j].end());
          found.halves[j].insert(found.halves[j].end(), halves[j].begin(), halves[j].end());
        }
      } else {
        const LaneColumn idle{Column{ky, kx, 0}, std::vector<int64_t>(vl, -1)};
        for (size_t e = 0; e < most_own; ++e)
          for (int j = 0; j < s.nv; ++j)
            found.lanes.push_back(e < own[j].size() ? own[j][e] : idle);
      }
    }
  std::stable_sort(found.broadcast.begin(), found.broadcast.end());
}

// Vector multiply-adds per output pixel, weighted by how far each micro-kernel stays from the peak,
// and what it costs to bring a channel in and a filter out.
double Plan::filters_cost() const {
  if (pairs()) return pairs_cost();
  const ColumnCosts& costs = costs_on(kernels_);
  double total = (channels_last_ ? 1.5 : 3.2) * double(low_.C + low_.F);
  for (const FilterSegment& s : segments_) {
    const int in_rows = 3 * s.triples + 2 * s.twins;
    total += s.nv * ((s.nv == 1 ? costs.split : 1.0) * (4 * s.quads + s.singles) +
                     costs.split * s.split + costs.straight * s.straight +
                     costs.permuted * (s.permuted - in_rows) + costs.row * in_rows + 2);
    for (int j = 0; j < s.nv; ++j)
      total += 2 * (costs.pair * s.pairs[j] + costs.half * s.halves[j]);
    if (channels_last_ && !s.contiguous) total += kScatterCost * s.lanes;
  }
  return total;
}

}  // namespace hetconv
