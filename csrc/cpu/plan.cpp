// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace hetconv {

// Cost of one vector multiply-add with an operand that is a broadcast for one vector only, a vector
// of activations, or a permuted one; a broadcast shared by two vectors costs 1. Measured on Zen 5.
constexpr double kSplitCost = 1.33, kStraightCost = 1.2, kTurnedCost = 2.0;
// Cost of one output that goes to memory alone, because the filters of its vector are not
// neighbours there.
constexpr double kScatterCost = 11;

Plan::Plan(const uint8_t* mask, int F, int C, int KH, int KW, DType dtype, const Kernels& kernels,
           const std::string& form, bool channels_last)
    : kernels_(kernels), dtype_(dtype), cache_(offsets_new(), offsets_delete) {
  low_.F = F;
  low_.C = C;
  low_.KH = KH;
  low_.KW = KW;
  low_.vl = kernels.vector_bytes / int(accumulator_bytes());
  const size_t row = size_t(C) * KH * KW;
  mask_.resize(row * F);
  for (size_t i = 0; i < mask_.size(); ++i) mask_[i] = mask[i] != 0;
  std::map<std::string, int> known;
  plane_.assign(C, -1);
  for (int f = 0; f < F; ++f) {
    const std::string key(reinterpret_cast<const char*>(mask_.data() + f * row), row);
    const auto found = known.emplace(key, int(groups_.size()));
    if (found.second) {
      groups_.emplace_back();
      for (int ky = 0; ky < KH; ++ky)
        for (int kx = 0; kx < KW; ++kx)
          for (int c = 0; c < C; ++c)
            if (has(f, c, ky, kx)) {
              groups_.back().columns.push_back(Column{ky, kx, c});
              plane_[c] = 0;
            }
    }
    groups_[found.first->second].filters.push_back(f);
    live_count_ += int64_t(groups_[found.first->second].columns.size());
  }
  for (int f = 0; f < F || f < kernels.max_pixel_filters; ++f) identity_.push_back(f);
  for (int c = 0; c < C; ++c)
    if (plane_[c] == 0) {
      plane_[c] = int(live_.size());
      live_.push_back(c);
    }
  if (form == "filters")
    lower_filters();
  else if (form == "pixels")
    lower_pixels();
  else if (form == "columns")
    lower_columns();
  else {
    lower_filters();
    const double as_filters = filters_cost(channels_last);
    lower_columns();
    const double as_columns = pixels_cost(channels_last);
    lower_pixels();
    const double as_pixels = pixels_cost(channels_last);
    if (as_filters <= as_pixels && as_filters <= as_columns)
      lower_filters();
    else if (as_columns < as_pixels)
      lower_columns();
  }
  cost_ = low_.form == Form::filters ? filters_cost(channels_last) : pixels_cost(channels_last);
  finish();
}

Plan::~Plan() = default;

void Plan::clear() {
  segments_.clear();
  tiles_.clear();
  filters_.clear();
  columns_.clear();
  perms32_.clear();
  perms64_.clear();
  taken_.clear();
  low_.accumulate = 0;
  low_.packed = 0;
}

void Plan::perm_push(int64_t v) {
  if (dtype_ == DType::f64)
    perms64_.push_back(v);
  else
    perms32_.push_back(int32_t(v));
}

// Lanes of a wide group fill whole vectors; groups narrower than a vector share one, each with its
// own lane columns.
void Plan::lower_filters() {
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

  std::vector<Column> broadcast, split, lanes;
  std::vector<std::vector<int64_t>> lane_channels;
  if (group)
    broadcast = group->columns;
  else
    add_lane_columns(s, filters, broadcast, split, lanes, lane_channels);

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
  columns_.insert(columns_.end(), split.begin(), split.end());
  s.split = int(split.size()) / s.nv;

  // Lane columns that need no permutation come first.
  const size_t per = size_t(s.nv), count = lanes.size() / per;
  for (int turned = 0; turned < 2; ++turned)
    for (size_t q = 0; q < count; ++q) {
      bool straight = true;
      for (size_t j = 0; j < per; ++j)
        for (int l = 0; l < vl; ++l) {
          const int64_t c = lane_channels[q * per + j][l];
          if (c >= 0 && c != lanes[q * per + j].channel + l) straight = false;
        }
      if (straight == (turned == 1)) continue;
      (turned ? s.turned : s.straight) += 1;
      for (size_t j = 0; j < per; ++j) {
        columns_.push_back(lanes[q * per + j]);
        for (int l = 0; l < vl; ++l) {
          const int64_t c = lane_channels[q * per + j][l];
          taken_.push_back(c >= 0);
          if (turned) perm_push(c >= 0 ? c - lanes[q * per + j].channel : 0);
        }
      }
    }
  low_.packed += int64_t(4 * s.quads + s.singles + s.split + s.straight + s.turned) * s.nv * vl;
  segments_.push_back(s);
}

// Splits the columns of lanes that differ into broadcast columns (some lanes hold a zero) and lane
// columns.
void Plan::add_lane_columns(FilterSegment& s, const std::vector<int>& filters,
                            std::vector<Column>& broadcast, std::vector<Column>& split,
                            std::vector<Column>& lanes,
                            std::vector<std::vector<int64_t>>& lane_channels) {
  const int vl = low_.vl, C = low_.C, padded = (C + vl - 1) / vl * vl;
  for (int ky = 0; ky < low_.KH; ++ky)
    for (int kx = 0; kx < low_.KW; ++kx) {
      std::vector<Column> common, rest;
      for (int c = 0; c < C; ++c) {
        int n = 0;
        for (int f : filters) n += has(f, c, ky, kx);
        if (n == s.lanes)
          common.push_back(Column{ky, kx, c});
        else if (n > 0)
          rest.push_back(Column{ky, kx, c});
      }
      // Lane columns of every vector: windows of VL channels from the first channel still needed.
      std::vector<std::vector<std::pair<int, std::vector<int64_t>>>> own(s.nv);
      size_t entries = 0;
      for (int j = 0; j < s.nv; ++j) {
        const int first = j * vl, n = std::min(vl, s.lanes - first);
        std::vector<uint8_t> needed(padded, 0);
        for (const Column& c : rest)
          for (int l = 0; l < n; ++l)
            needed[c.channel] |= has(filters[first + l], c.channel, ky, kx);
        for (int c = 0; c < C;) {
          if (!needed[c]) {
            ++c;
            continue;
          }
          const int base = std::min(c, padded - vl);
          std::vector<std::vector<int64_t>> rows;
          for (int l = 0; l < n; ++l) {
            // The diagonal entry first: a lane that can read its own position needs no permutation.
            std::vector<int64_t> mine;
            for (int k = 0; k < vl; ++k) {
              const int channel = base + (l + k) % vl;
              if (channel >= c && channel < C && needed[channel] &&
                  has(filters[first + l], channel, ky, kx))
                mine.push_back(channel);
            }
            for (size_t e = 0; e < mine.size(); ++e) {
              if (rows.size() <= e) rows.emplace_back(vl, -1);
              rows[e][l] = mine[e];
            }
          }
          for (auto& r : rows) own[j].emplace_back(base, r);
          c = base + vl;
        }
        entries = std::max(entries, own[j].size());
      }
      broadcast.insert(broadcast.end(), common.begin(), common.end());
      // Broadcast columns of each vector alone.
      std::vector<std::vector<Column>> alone(s.nv);
      size_t longest = 0;
      for (int j = 0; j < s.nv; ++j) {
        for (const Column& c : rest)
          for (int l = j * vl; l < std::min(s.lanes, (j + 1) * vl); ++l)
            if (has(filters[l], c.channel, ky, kx)) {
              alone[j].push_back(c);
              break;
            }
        longest = std::max(longest, alone[j].size());
      }
      const double as_lanes = kTurnedCost * double(entries),
                   as_split = kSplitCost * double(longest), as_broadcast = double(rest.size());
      if (as_broadcast <= as_lanes && (s.nv == 1 || as_broadcast <= as_split)) {
        broadcast.insert(broadcast.end(), rest.begin(), rest.end());
        continue;
      }
      if (s.nv > 1 && as_split <= as_lanes) {
        for (size_t e = 0; e < longest; ++e)
          for (int j = 0; j < s.nv; ++j) {
            const bool some = e < alone[j].size();
            split.push_back(some ? alone[j][e]
                                 : Column{ky, kx, alone[j].empty() ? 0 : alone[j][0].channel, 1});
          }
        continue;
      }
      for (size_t e = 0; e < entries; ++e)
        for (int j = 0; j < s.nv; ++j) {
          const bool some = e < own[j].size();
          lanes.push_back(Column{ky, kx, some ? own[j][e].first : 0});
          lane_channels.push_back(some ? own[j][e].second : std::vector<int64_t>(vl, -1));
        }
    }
  std::stable_sort(broadcast.begin(), broadcast.end(), [](const Column& a, const Column& b) {
    return std::make_pair(a.ky, a.kx) == std::make_pair(b.ky, b.kx)
               ? a.channel < b.channel
               : std::make_pair(a.ky, a.kx) < std::make_pair(b.ky, b.kx);
  });
}

// At most `max_pixel_filters` in a tile, as equal as possible; columns by channel, then tap.
void Plan::add_tiles(const std::vector<int>& filters, const std::vector<Column>& given) {
  const int most = kernels_.max_pixel_filters, n = int(filters.size()),
            count = (n + most - 1) / most;
  const int64_t col0 = int64_t(columns_.size());
  std::vector<Column> columns = given;
  std::stable_sort(columns.begin(), columns.end(),
                   [](const Column& a, const Column& b) { return a.channel < b.channel; });
  columns_.insert(columns_.end(), columns.begin(), columns.end());
  bool whole = low_.KW > 1 && columns.size() % low_.KW == 0;
  for (size_t k = 0; whole && k < columns.size(); ++k) {
    const Column& first = columns[k - k % low_.KW];
    whole = columns[k].kx == int(k % low_.KW) && columns[k].ky == first.ky &&
            columns[k].channel == first.channel;
  }
  for (int i = 0, f = 0; i < count; ++i) {
    const int nf = n / count + (i < n % count);
    tiles_.push_back(PixelTile{nf, int(filters_.size()), int(columns.size()),
                               whole && !low_.accumulate && nf <= 2 && nf * low_.KW <= most, col0,
                               low_.packed});
    filters_.insert(filters_.end(), filters.begin() + f, filters.begin() + f + nf);
    low_.packed += int64_t(nf) * int64_t(columns.size());
    f += nf;
  }
}

void Plan::lower_pixels() {
  clear();
  low_.form = Form::pixels;
  for (const Group& g : groups_) add_tiles(g.filters, g.columns);
}

// The transposed view: columns that serve the same filters go together. A Support whose transpose
// has few groups (the dgrad of self-grouping) becomes a few dense blocks this way, each added into
// its filters.
void Plan::lower_columns() {
  clear();
  low_.form = Form::pixels;
  low_.accumulate = 1;
  std::map<std::vector<int>, std::vector<Column>> blocks;
  for (int c = 0; c < low_.C; ++c)
    for (int ky = 0; ky < low_.KH; ++ky)
      for (int kx = 0; kx < low_.KW; ++kx) {
        std::vector<int> filters;
        for (int f = 0; f < low_.F; ++f)
          if (has(f, c, ky, kx)) filters.push_back(f);
        if (!filters.empty()) blocks[filters].push_back(Column{ky, kx, c});
      }
  for (const auto& b : blocks) add_tiles(b.first, b.second);
}

// Vector multiply-adds per output pixel, weighted by how far each micro-kernel stays from the peak,
// and what it costs to bring a channel in and a filter out.
double Plan::filters_cost(bool channels_last) const {
  // A pointwise input is read in place, from far away; another one is packed first.
  const double in = low_.KH * low_.KW == 1 ? 3.0 : 1.5;
  double total = channels_last ? in * low_.C + 1.5 * low_.F : 3.2 * double(low_.C + low_.F);
  for (const FilterSegment& s : segments_) {
    total +=
        s.nv * ((s.nv == 1 ? kSplitCost : 1.0) * (4 * s.quads + s.singles) + kSplitCost * s.split +
                kStraightCost * s.straight + kTurnedCost * s.turned + 2);
    if (channels_last && !s.contiguous) total += kScatterCost * s.lanes;
  }
  return total;
}

double Plan::pixels_cost(bool channels_last) const {
  static const double slow[9] = {0, 2.2, 1.25, 1.1, 1.05, 1.05, 1.05, 1.05, 1.05};
  double total = channels_last ? 3.0 * double(live_.size()) + 3.4 * low_.F
                               : 2.6 * double(live_.size()) + 2.2 * low_.F;
  for (const PixelTile& t : tiles_)
    total += (t.whole_rows ? slow[3] : slow[t.nf]) * t.nf *
             double(t.ncols + (low_.accumulate ? 12 : 4)) / low_.vl;
  return total;
}

void Plan::finish() {
  if (!low_.accumulate) {
    ascending_.resize(filters_.size());
    for (size_t i = 0; i < filters_.size(); ++i) ascending_[filters_[i]] = int(i);
  }
  low_.count = int(low_.form == Form::filters ? segments_.size() : tiles_.size());
  low_.segments = segments_.data();
  low_.tiles = tiles_.data();
  low_.filters = filters_.data();
  low_.columns = columns_.data();
  low_.ncolumns = int64_t(columns_.size());
  low_.perms = dtype_ == DType::f64 ? static_cast<const void*>(perms64_.data())
                                    : static_cast<const void*>(perms32_.data());
  low_.taken = taken_.data();
  low_.live = live_.data();
  low_.nlive = int(live_.size());
  low_.plane = plane_.data();
  low_.ascending = ascending_.data();
  low_.identity = identity_.data();
  low_.mask = mask_.data();
}

}  // namespace hetconv
