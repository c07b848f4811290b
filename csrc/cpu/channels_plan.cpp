// SPDX-License-Identifier: Apache-2.0
#include "channels_plan.h"

#include <algorithm>
#include <map>

namespace hetconv {

// In units of one vector multiply-add, of which two start in a cycle.
constexpr double kLatency = 8;        // a tile of fewer sums waits for its own results
constexpr double kTileCost = 0.5;     // per tile and pixel
constexpr double kPermuteCost = 1.2;  // a row whose filters are permuted, against a broadcast
// Bringing in one vector: copied; transposed from a planar band; that band itself, per channel.
constexpr double kCopyCost = 4, kPermutedCost = 10, kPlaneCost = 0.7;

ChannelsPlan::ChannelsPlan(const Plan& plan) : plan_(plan), vl_(plan.lowered().vl) {
  double best = 0;
  int form = 0;
  for (int k = 0; k < 3; ++k) {
    k < 2 ? lower_together(k == 0) : lower_apart();
    finish();
    if (k == 0 || cost(true) < best) {
      best = cost(true);
      form = k;
    }
  }
  if (form < 2) {
    lower_together(form == 0);
    finish();
  }
}

void ChannelsPlan::clear() {
  units_.clear();
  tiles_.clear();
  windows_.clear();
  work_.assign(1, 0);
  channels_.clear();
  filters_.clear();
  perms32_.clear();
  perms64_.clear();
  taken_.clear();
  low_.sums = 0;
  work_cost_ = 0;
}

// One order of the channels for all groups: channels that the same groups read stand together.
// aligned: no such block lies in more vectors than it must.
void ChannelsPlan::lower_together(bool aligned) {
  clear();
  const std::vector<Group>& groups = plan_.groups();
  std::vector<std::vector<int64_t>> readers(plan_.lowered().C);
  Members all;
  for (size_t g = 0; g < groups.size(); ++g) {
    all.push_back(&groups[g]);
    for (const Column& c : groups[g].columns)
      readers[c.channel].push_back((int64_t(g) * kMaxKernel + c.ky) * kMaxKernel + c.kx);
  }
  std::map<std::vector<int64_t>, int> known;
  std::vector<std::vector<int>> blocks;
  for (int c = 0; c < plan_.lowered().C; ++c) {
    if (readers[c].empty()) continue;
    const auto found = known.emplace(readers[c], int(blocks.size()));
    if (found.second) blocks.emplace_back();
    blocks[found.first->second].push_back(c);
  }
  std::vector<int> order;
  for (const std::vector<int>& block : blocks) {
    const int n = int(block.size()), at = int(order.size()) % vl_;
    if (aligned && (at + n + vl_ - 1) / vl_ > (n + vl_ - 1) / vl_)
      order.resize((order.size() + vl_ - 1) / vl_ * vl_, -1);
    order.insert(order.end(), block.begin(), block.end());
  }
  add_unit(all, order);
}

// Every group packs the channels that it reads.
void ChannelsPlan::lower_apart() {
  clear();
  for (const Group& g : plan_.groups()) {
    std::vector<int> order;
    for (const Column& c : g.columns) order.push_back(c.channel);
    std::sort(order.begin(), order.end());
    order.erase(std::unique(order.begin(), order.end()), order.end());
    if (!order.empty()) add_unit({&g}, order);
  }
}

void ChannelsPlan::add_unit(const Members& groups, const std::vector<int>& channels) {
  ChannelUnit u{};
  u.x0 = int(channels_.size()) / vl_;
  u.y0 = int(filters_.size()) / vl_;
  u.tile0 = int(tiles_.size());
  std::vector<int> lane_of(plan_.lowered().C, -1), group_of;
  for (size_t i = 0; i < channels.size(); ++i)
    if (channels[i] >= 0) lane_of[channels[i]] = int(i);
  channels_.insert(channels_.end(), channels.begin(), channels.end());
  channels_.resize((channels_.size() + vl_ - 1) / vl_ * vl_, -1);
  for (size_t g = 0; g < groups.size(); ++g) {
    filters_.insert(filters_.end(), groups[g]->filters.begin(), groups[g]->filters.end());
    group_of.insert(group_of.end(), groups[g]->filters.size(), int(g));
  }
  filters_.resize((filters_.size() + vl_ - 1) / vl_ * vl_, -1);
  u.nx = int(channels_.size()) / vl_ - u.x0;
  u.ny = int(filters_.size()) / vl_ - u.y0;
  group_of.resize(size_t(u.ny) * vl_, -1);
  for (int v = 0; v < u.ny; ++v)
    add_vector(groups, group_of.data() + size_t(v) * vl_, u.y0 + v, u.x0, lane_of);
  u.tiles = int(tiles_.size()) - u.tile0;
  if (u.tiles > 0) units_.push_back(u);
}

// The tiles of one vector of filters.
void ChannelsPlan::add_vector(const Members& groups, const int* group_of, int vector, int x0,
                              const std::vector<int>& lane_of) {
  std::map<std::vector<int>, Bits> needs;  // tap and vector of channels -> who needs which lanes
  for (int l = 0; l < vl_; ++l) {
    const int g = group_of[l];
    if (g < 0) continue;
    for (const Column& c : groups[g]->columns) {
      const int lane = lane_of[c.channel];
      Bits& bits = needs[{c.ky, c.kx, x0 + lane / vl_}];
      bits.resize(vl_);
      bits[l] |= 1u << (lane % vl_);
    }
  }
  // Windows that few rotations cover, by their pattern; the others by the filters that need them.
  std::map<Bits, std::vector<ChannelWindow>> permuted;
  std::vector<std::vector<ChannelWindow>> read(vl_);
  std::vector<Bits> lanes(vl_);
  for (const auto& [at, bits] : needs) {
    int rows = 0, permuted_rows = 0;
    for (int l = 0; l < vl_; ++l) rows += bits[l] != 0;
    for (int c = 0; c < vl_; ++c) {
      int n = 0;
      for (int l = 0; l < vl_; ++l) n += bits[l] >> c & 1;
      permuted_rows = std::max(permuted_rows, n);
    }
    const ChannelWindow window{at[0], at[1], at[2]};
    if (permuted_rows * kPermuteCost < rows && (vl_ > 4 || permuted_rows == 1)) {
      permuted[bits].push_back(window);
      continue;
    }
    for (int l = 0; l < vl_; ++l)
      if (bits[l] != 0) {
        read[l].push_back(window);
        lanes[l].push_back(bits[l]);
      }
  }
  for (const auto& [pattern, windows] : permuted) add_permuted(pattern, windows, vector);
  const auto same = [](const std::vector<ChannelWindow>& a, const std::vector<ChannelWindow>& b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(),
                                              [](const ChannelWindow& s, const ChannelWindow& t) {
                                                return s.ky == t.ky && s.kx == t.kx &&
                                                       s.vector == t.vector;
                                              });
  };
  for (int l = 0; l < vl_;) {
    int n = 1;
    while (l + n < vl_ && same(read[l], read[l + n])) ++n;
    if (!read[l].empty()) add_broadcast(l, n, read[l], vector, lanes);
    l += n;
  }
}

// Row r pairs every lane with the r-th filter that needs it.
void ChannelsPlan::add_permuted(const Bits& pattern, const std::vector<ChannelWindow>& windows,
                                int vector) {
  std::vector<std::vector<int>> mine(vl_);
  size_t permuted_rows = 0;
  for (int c = 0; c < vl_; ++c) {
    for (int l = 0; l < vl_; ++l)
      if (pattern[l] >> c & 1) mine[c].push_back(l);
    permuted_rows = std::max(permuted_rows, mine[c].size());
  }
  const int most = plan_.kernels().permuted, n = int(permuted_rows), parts = (n + most - 1) / most;
  for (int i = 0, r = 0; i < parts; ++i) {
    const int nf = n / parts + (i < n % parts);
    ChannelTile t{};
    t.permuted = 1;
    t.vector = vector;
    t.nf = nf;
    t.perm0 = int64_t(taken_.size());
    for (int k = r; k < r + nf; ++k)
      for (int c = 0; c < vl_; ++c) {
        const bool some = size_t(k) < mine[c].size();
        const int lane = some ? mine[c][k] : 0;
        taken_.push_back(some);
        if (plan_.dtype() == DType::f64)
          perms64_.push_back(lane);
        else
          perms32_.push_back(lane);
      }
    r += nf;
    const int limit = plan_.kernels().permuted_windows[nf], w = int(windows.size()),
              blocks = (w + limit - 1) / limit;
    for (int b = 0, at = 0; b < blocks; ++b) {
      t.nv = w / blocks + (b < w % blocks);
      add_tile(t, windows.data() + at, std::max<double>(kLatency, kPermuteCost * nf * t.nv));
      at += t.nv;
    }
  }
}

static double tile_cost(int nf, int nv) {
  return std::max({double(nf * nv), double(nf + nv), kLatency}) + kTileCost;
}

// Lanes of a vector of channels that are not idle.
uint32_t ChannelsPlan::lanes_in_use(int vector) const {
  uint32_t bits = 0;
  for (int l = 0; l < vl_; ++l) bits |= uint32_t(channels_[size_t(vector) * vl_ + l] >= 0) << l;
  return bits;
}

// `n` neighbouring filters that need the same windows: the split into tiles that costs least.
void ChannelsPlan::add_broadcast(int first, int n, const std::vector<ChannelWindow>& windows,
                                 int vector, const std::vector<Bits>& lanes) {
  const Kernels& kernels = plan_.kernels();
  const int w = int(windows.size());
  double best = -1;
  int rows = 1, blocks = 1;
  for (int nf = 1; nf <= std::min(n, kernels.window_filters); ++nf) {
    const int a = (n + nf - 1) / nf, limit = kernels.windows[(n + a - 1) / a],
              b = (w + limit - 1) / limit;
    double cost = 0;
    for (int i = 0; i < a; ++i)
      for (int j = 0; j < b; ++j) cost += tile_cost(n / a + (i < n % a), w / b + (j < w % b));
    if (best < 0 || cost <= best) {  // of equals the one with fewer windows: they are long streams
      best = cost;
      rows = a;
      blocks = b;
    }
  }
  for (int i = 0, f = 0; i < rows; ++i) {
    ChannelTile t{};
    t.vector = vector;
    t.first = first + f;
    t.nf = n / rows + (i < n % rows);
    for (int j = 0, at = 0; j < blocks; ++j) {
      t.nv = w / blocks + (j < w % blocks);
      t.whole = 1;
      for (int k = 0; k < t.nf; ++k)
        for (int v = 0; v < t.nv; ++v)
          t.whole &= lanes[t.first + k][at + v] == lanes_in_use(windows[at + v].vector);
      add_tile(t, windows.data() + at, tile_cost(t.nf, t.nv));
      at += t.nv;
    }
    f += t.nf;
  }
}

void ChannelsPlan::add_tile(ChannelTile t, const ChannelWindow* windows, double cost) {
  t.window0 = int(windows_.size());
  t.sum0 = low_.sums;
  windows_.insert(windows_.end(), windows, windows + t.nv);
  low_.sums += int64_t(t.nf) * t.nv * vl_;
  work_.push_back(work_.back() + int64_t(2 * cost));
  work_cost_ += cost;
  tiles_.push_back(t);
}

// How many lanes from the first hold neighbours; 0 if another lane is in use too.
static std::vector<int> runs_of(const std::vector<int>& lanes, int vl) {
  std::vector<int> runs;
  for (size_t v = 0; v < lanes.size(); v += vl) {
    int n = 0;
    while (n < vl && lanes[v + n] >= 0 && lanes[v + n] == lanes[v] + n) ++n;
    for (int l = n; l < vl; ++l)
      if (lanes[v + l] >= 0) n = 0;
    runs.push_back(n);
  }
  return runs;
}

void ChannelsPlan::finish() {
  const Lowered& plan = plan_.lowered();
  channel_run_ = runs_of(channels_, vl_);
  filter_run_ = runs_of(filters_, vl_);
  planes_.clear();
  for (int c : channels_) planes_.push_back(c < 0 ? -1 : plan.plane[c]);
  low_.vl = vl_;
  low_.F = plan.F;
  low_.C = plan.C;
  low_.KH = plan.KH;
  low_.KW = plan.KW;
  low_.units = int(units_.size());
  low_.tiles = int(tiles_.size());
  low_.most_x = low_.most_y = 0;
  for (const ChannelUnit& u : units_) {
    low_.most_x = std::max(low_.most_x, u.nx);
    low_.most_y = std::max(low_.most_y, u.ny);
  }
  const auto scattered = [](const std::vector<int>& runs) {
    return int(std::count(runs.begin(), runs.end(), 0) > 0);
  };
  low_.scattered_x = units_.size() > 1 || scattered(channel_run_);
  low_.scattered_y = scattered(filter_run_);
  low_.unit = units_.data();
  low_.tile = tiles_.data();
  low_.window = windows_.data();
  low_.windows = int64_t(windows_.size());
  low_.work = work_.data();
  low_.channels = channels_.data();
  low_.planes = planes_.data();
  low_.channel_run = channel_run_.data();
  low_.filters = filters_.data();
  low_.filter_run = filter_run_.data();
  low_.live = plan.live;
  low_.nlive = plan.nlive;
  low_.plane = plan.plane;
  low_.identity = plan.identity;
  low_.perms = plan_.dtype() == DType::f64 ? static_cast<const void*>(perms64_.data())
                                           : static_cast<const void*>(perms32_.data());
  low_.taken = taken_.data();
  low_.mask = plan.mask;
}

double ChannelsPlan::cost(bool channels_last) const {
  const auto moved = [&](int scattered, size_t lanes, int planes) {
    const double vectors = double(lanes) / vl_;
    return scattered || !channels_last ? kPermutedCost * vectors + kPlaneCost * planes
                                       : kCopyCost * vectors;
  };
  return work_cost_ + 1.2 * moved(low_.scattered_x, channels_.size(), low_.nlive) +
         moved(low_.scattered_y, filters_.size(), low_.F);
}

}  // namespace hetconv
