// SPDX-License-Identifier: Apache-2.0
// Filters in vectors of bfloat16: which filters share vectors, and which two channels a lane reads
// at once. A channel without a partner is read with a neighbour whose weight is zero.
#include <algorithm>

#include "plan.h"

namespace hetconv {

// Cost of one vector of products with an operand that is a broadcast for one vector only, or a
// permuted window; a broadcast shared by two vectors costs 1.
// kRowCost: of a window that is permuted once for a row of taps.
constexpr double kAloneCost = 1.05, kWindowCost = 1.6, kRowCost = 1.15;
// Cost of 2 * VL channels of one pixel that are looked through for a copy.
constexpr double kGatherCost = 3;
// Cost of one output that goes to memory alone (see plan_filters.cpp).
constexpr double kScatterCost = 11;

// Covers the channels of one tap, ascending, by pairs of neighbours that lie within C channels.
static std::vector<Column> cover(const std::vector<Column>& channels, int C) {
  std::vector<Column> pairs;
  for (size_t i = 0; i < channels.size(); ++i) {
    Column pair = channels[i];
    const bool two = i + 1 < channels.size() && channels[i + 1].channel == pair.channel + 1;
    if (!two) {
      pair.idle = C > 1 && pair.channel == C - 1 ? kLower : kUpper;
      pair.channel -= pair.idle == kLower;
    }
    pairs.push_back(pair);
    i += two;
  }
  return pairs;
}

void Plan::lower_pairs() {
  const int vl = low_.vl;
  // Filters of groups below a vector: by group, or in the order in which they lie in memory.
  std::vector<int> by_group, ascending;
  for (const Group& g : groups_)
    if (int(g.filters.size()) < vl && groups_.size() > 1)
      by_group.insert(by_group.end(), g.filters.begin(), g.filters.end());
  ascending = by_group;
  std::sort(ascending.begin(), ascending.end());
  lower_pairs_in(by_group);
  if (by_group == ascending) return;
  const double cost = pairs_cost();
  lower_pairs_in(ascending);
  if (cost < pairs_cost()) lower_pairs_in(by_group);
}

void Plan::lower_pairs_in(const std::vector<int>& narrow) {
  clear();
  low_.form = Form::filters;
  // Of few channels, a pair takes the last one of a pixel and the first of the next.
  low_.span = low_.KW > 1 && low_.C < 16 && low_.C % 2 != 0;
  const size_t vl = size_t(low_.vl);
  const auto block = [](const std::vector<int>& filters, size_t first, size_t most) {
    return std::vector<int>(filters.begin() + first,
                            filters.begin() + std::min(filters.size(), first + most));
  };
  for (const Group& g : groups_)
    if (g.filters.size() >= vl || groups_.size() == 1)
      for (size_t i = 0; i < g.filters.size(); i += 2 * vl)
        add_pair_segment(block(g.filters, i, 2 * vl), &g);
  for (size_t i = 0; i < narrow.size(); i += vl) add_pair_segment(block(narrow, i, vl), nullptr);
}

// The windows of one vector of lanes that read `rest` of one tap: two channels a lane at a time.
static std::vector<LaneColumn> windows_of(const std::vector<std::vector<int>>& channels_of,
                                          const Column& tap, int C, int vl) {
  std::vector<LaneColumn> found;
  const int wide = 2 * vl, padded = (C + wide - 1) / wide * wide;
  for (int c = 0; c < C;) {
    int first = C;  // still needed
    for (const auto& channels : channels_of) {
      const auto at = std::lower_bound(channels.begin(), channels.end(), c);
      if (at != channels.end()) first = std::min(first, *at);
    }
    if (first == C) break;
    const Column window{tap.ky, tap.kx, std::min(first, padded - wide)};
    std::vector<LaneColumn> columns;
    for (size_t l = 0; l < channels_of.size(); ++l) {
      size_t entry = 0;
      for (int channel : channels_of[l]) {
        if (channel < first || channel >= window.channel + wide) continue;
        if (columns.size() <= entry / 2)
          columns.push_back({window, std::vector<int64_t>(size_t(wide), -1)});
        columns[entry / 2].channels[2 * l + entry % 2] = channel;
        ++entry;
      }
    }
    found.insert(found.end(), columns.begin(), columns.end());
    c = window.channel + wide;
  }
  return found;
}

void Plan::add_pair_segment(const std::vector<int>& filters, const Group* group) {
  const int vl = low_.vl;
  PairSegment s{};
  s.lanes = int(filters.size());
  s.nv = (s.lanes + vl - 1) / vl;
  s.filter0 = int(filters_.size());
  s.contiguous = 1;
  for (int l = 0; l < s.lanes; ++l) s.contiguous &= filters[l] == filters[0] + l;
  s.col0 = int64_t(columns_.size());
  s.w0 = low_.packed;
  s.perm0 = int64_t(perms32_.size());
  s.taken0 = int64_t(taken_.size());
  filters_.insert(filters_.end(), filters.begin(), filters.end());

  std::vector<Column> pairs;
  std::vector<std::vector<Column>> taps;  // what is read of each tap
  double costs = 0;
  std::vector<std::vector<LaneColumn>> windows(static_cast<size_t>(s.nv));
  const int together = low_.span ? low_.KW : 1, width = together * low_.C;
  for (int ky = 0; ky < low_.KH; ++ky)
    for (int kx = 0; kx < low_.KW; kx += together) {
      std::vector<Column> some,
          all;  // channels that some of the lanes read, and that all of them do
      std::vector<std::vector<int>> rest(filters.size());  // of each lane, what not all read
      for (int c = 0; c < width; ++c) {
        size_t readers = 0;
        for (int f : filters) {
          readers += has(f, c % low_.C, ky, kx + c / low_.C);
          if (group) break;  // one speaks for all
        }
        if (readers == 0) continue;
        some.push_back(Column{ky, kx, c});
        if (group || readers == filters.size())
          all.push_back(some.back());
        else
          for (size_t l = 0; l < filters.size(); ++l)
            if (has(filters[l], c % low_.C, ky, kx + c / low_.C)) rest[l].push_back(c);
      }
      std::vector<Column> broadcast = cover(some, width);
      if (all.size() < some.size() && !low_.span) {
        const std::vector<Column> common = cover(all, low_.C);
        std::vector<std::vector<LaneColumn>> own;
        size_t most = 0;
        for (int j = 0; j < s.nv; ++j) {
          const size_t first = size_t(j * vl), last = std::min(filters.size(), first + size_t(vl));
          own.push_back(windows_of({rest.begin() + first, rest.begin() + last}, Column{ky, kx, 0},
                                   low_.C, vl));
          most = std::max(most, own.back().size());
        }
        // Where a row has three taps, most of them are neighbours at stride 1.
        const double read = (low_.KW < 3 ? kWindowCost : kRowCost) * double(most);
        if (double(common.size()) + read < double(broadcast.size())) {
          broadcast = common;
          costs += read;
          const LaneColumn idle{Column{ky, kx, 0}, std::vector<int64_t>(size_t(2 * vl), -1)};
          for (size_t j = 0; j < own.size(); ++j) {
            own[j].resize(most, idle);
            windows[j].insert(windows[j].end(), own[j].begin(), own[j].end());
          }
        }
      }
      pairs.insert(pairs.end(), broadcast.begin(), broadcast.end());
      if (!some.empty()) taps.push_back(some);
    }
  // Winograd's bands have no copies.
  const bool may_copy = !low_.span && winograd_.tile == 0;
  if (may_copy && gather_channels(s, taps, costs + double(pairs.size()))) {
    pairs.clear();
    for (auto& own : windows) own.clear();
    for (std::vector<Column>& tap : taps) {
      const std::vector<Column> some = cover(tap, int(gathered_.size()) - s.gathered0);
      pairs.insert(pairs.end(), some.begin(), some.end());
    }
  }

  std::vector<Column> single;
  for (size_t i = 0; i < pairs.size();) {
    bool run = i + 3 < pairs.size();
    for (size_t k = 1; run && k < 4; ++k)
      run = pairs[i + k].ky == pairs[i].ky && pairs[i + k].kx == pairs[i].kx &&
            pairs[i + k].channel == pairs[i].channel + 2 * int(k) && !pairs[i + k].idle;
    run = run && !pairs[i].idle;
    (run ? columns_ : single).push_back(pairs[i]);
    s.runs += run;
    i += run ? 4 : 1;
  }
  s.pairs = int(single.size());
  columns_.insert(columns_.end(), single.begin(), single.end());
  add_windows(s, windows);
  low_.packed += int64_t(4 * s.runs + s.pairs + s.windows) * s.nv * vl;
  paired_.push_back(s);
}

// Where a copy of the channels that `taps` read pays for itself, makes the taps' channels numbers
// in it. cost: without one, per vector of filters.
bool Plan::gather_channels(PairSegment& s, std::vector<std::vector<Column>>& taps, double cost) {
  std::vector<int> place(size_t(low_.C), -1), channels;
  for (const std::vector<Column>& tap : taps)
    for (const Column& c : tap) place[size_t(c.channel)] = 0;
  for (int c = 0; c < low_.C; ++c)
    if (place[size_t(c)] == 0) {
      place[size_t(c)] = int(channels.size());
      channels.push_back(c);
    }
  const int wide = 2 * low_.vl, vectors = (low_.C + wide - 1) / wide;
  // Neighbouring segments that read the same channels share a copy.
  const PairSegment* before = paired_.empty() ? nullptr : &paired_.back();
  const bool shared = before && before->gathers > 0 &&
                      std::equal(channels.begin(), channels.end(),
                                 gathered_.begin() + before->gathered0, gathered_.end());
  std::vector<std::vector<Column>> placed = taps;
  double copied = shared ? 0 : kGatherCost * vectors / s.nv;
  for (std::vector<Column>& tap : placed) {
    for (Column& c : tap) c.channel = place[size_t(c.channel)];
    copied += double(cover(tap, int(channels.size())).size());
  }
  if (copied >= cost) return false;
  taps.swap(placed);
  if (shared) {
    s.gathers = before->gathers;
    s.gather0 = before->gather0;
    s.gathered0 = before->gathered0;
    return true;
  }
  s.gather0 = int(gather_.size());
  s.gathered0 = int(gathered_.size());
  for (size_t i = 0; i < channels.size();) {
    const int from = channels[i] / wide * wide;
    gather_.push_back({from, int(i), int64_t(perms32_.size())});
    std::vector<int> perm;
    for (; i < channels.size() && channels[i] < from + wide; ++i)
      perm.push_back(channels[i] - from);
    perm.resize(size_t(wide), perm.back());  // what is copied beyond them is of the same pixel
    for (int l = 0; l < wide; l += 2)
      perm_push(perm[size_t(l)] | int64_t(perm[size_t(l) + 1]) << 16);
  }
  s.gathers = int(gather_.size()) - s.gather0;
  gathered_.insert(gathered_.end(), channels.begin(), channels.end());
  s.perm0 = int64_t(perms32_.size());
  return true;
}

// windows: of each vector, equally many. Taps of one kernel row that share a permutation come
// first.
void Plan::add_windows(PairSegment& s, const std::vector<std::vector<LaneColumn>>& windows) {
  const size_t count = windows[0].size();
  const auto permuted_from = [&](const LaneColumn& column, size_t l) {
    const int64_t lower = column.channels[2 * l], upper = column.channels[2 * l + 1];
    const int64_t first = lower < 0 ? 0 : lower - column.window.channel,
                  second = upper < 0 ? first : upper - column.window.channel;
    return first | second << 16;
  };
  PermutedTaps taps;
  std::vector<size_t> again;  // again: a tap that reads the same once more
  for (size_t q = 0; q < count; ++q) {
    std::vector<int64_t> reads = {windows[0][q].window.ky};
    for (const std::vector<LaneColumn>& own : windows) {
      reads.push_back(own[q].window.channel);
      for (size_t l = 0; l < size_t(low_.vl); ++l) reads.push_back(permuted_from(own[q], l));
    }
    if (!taps[reads].emplace(windows[0][q].window.kx, q).second) again.push_back(q);
  }
  const PermutedRows rows = rows_of(std::move(taps), again);
  s.windows = int(count);
  s.triples = rows.triples;
  s.twins = rows.twins;
  for (size_t q : rows.order)
    for (const std::vector<LaneColumn>& own : windows) {
      const LaneColumn& column = own[q];
      columns_.push_back(column.window);
      for (size_t l = 0; l < size_t(low_.vl); ++l) {
        perm_push(permuted_from(column, l));
        taken_.push_back(uint8_t((column.channels[2 * l] < 0 ? 0 : kLower) |
                                 (column.channels[2 * l + 1] < 0 ? 0 : kUpper)));
      }
    }
}

// As filters_cost: each product of a vector is of two channels.
double Plan::pairs_cost() const {
  double total = (channels_last_ ? 0.8 : 3.2) * double(low_.C + low_.F);
  int copy = -1;
  for (const PairSegment& s : paired_) {
    if (s.gathers > 0 && s.gather0 != copy)
      total += kGatherCost * ((low_.C + 2 * low_.vl - 1) / (2 * low_.vl));
    copy = s.gathers > 0 ? s.gather0 : -1;
    const int in_rows = 3 * s.triples + 2 * s.twins;
    total += s.nv * ((s.nv == 1 ? kAloneCost : 1.0) * (4 * s.runs + s.pairs) +
                     kWindowCost * (s.windows - in_rows) + kRowCost * in_rows + 2);
    if (channels_last_ && !s.contiguous) total += kScatterCost * s.lanes;
  }
  return total;
}

}  // namespace hetconv
