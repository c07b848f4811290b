// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace hetconv {
namespace {

// What a core keeps close, and what a load from beyond costs in vector operations. Set by hand from
// a matrix product of 25088 channels, 1.6 MB of which are needed at once.
constexpr size_t kNearBytes = size_t(1) << 20;
constexpr double kFarLoad = 12;

}  // namespace

Plan::Plan(const uint8_t* mask, int F, int C, int KH, int KW, DType dtype, const Kernels& kernels,
           const std::string& form, bool channels_last)
    : kernels_(kernels),
      dtype_(dtype),
      asked_form_(form),
      channels_last_(channels_last),
      cache_(offsets_new(), offsets_delete) {
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
  if (form == "auto") {
    std::vector<const char*> forms = {"filters", "pixels", "columns"};
    if (pairs() && channels_last && fits_pixel_pairs()) forms.push_back("pixel pairs");
    std::string best;
    for (const std::string other : forms) {
      lower(other);
      const double found = cost_of_form();
      if (!best.empty() && found >= cost_) continue;
      best = other;
      cost_ = found;
    }
    if (best != forms.back()) lower(best);
  } else {
    lower(form);
    cost_ = cost_of_form();
  }
  if (tile_of(form)) cost_ += winograd_cost();
  finish();
}

void Plan::lower(const std::string& form) {
  if (form == "filters")
    lower_filters();
  else if (form == "columns")
    lower_columns();
  else if (tile_of(form))
    lower_winograd(tile_of(form));
  else if (form == "pixel pairs" && pairs() && fits_pixel_pairs())
    lower_pixel_pairs();
  else
    lower_pixels();
}

double Plan::cost_of_form() const {
  if (low_.form == Form::filters) return filters_cost();
  return pair_tiles_.empty() ? pixels_cost() : pixel_pairs_cost();
}

bool is_form(const std::string& name) {
  for (const char* known : {"auto", "filters", "pixels", "columns", "pixel pairs"})
    if (name == known) return true;
  return tile_of(name) != 0;
}

int tile_of(const std::string& form) {
  for (int tile : {2, 3, 4})
    if (form == form_of(tile)) return tile;
  return 0;
}

bool takes_steps(int tile, const Problem& p) {
  const int stride = phases(tile);
  return !tile || (p.sh == stride && p.sw == stride && p.dh == 1 && p.dw == 1);
}

const char* form_of(int tile) {
  return tile == 2 ? "winograd 2x2" : tile == 3 ? "winograd 3x3" : "winograd 4x4";
}

Plan::~Plan() = default;

void Plan::clear() {
  segments_.clear();
  paired_.clear();
  pair_tiles_.clear();
  pair_gathers_.clear();
  pixel_pairs_ = {};
  gather_.clear();
  gathered_.clear();
  tiles_.clear();
  filters_.clear();
  columns_.clear();
  perms32_.clear();
  perms64_.clear();
  taken_.clear();
  low_.accumulate = 0;
  low_.span = 0;
  low_.packed = 0;
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

// As filters_cost.
double Plan::pixels_cost() const {
  static const double slow[9] = {0, 2.2, 1.25, 1.1, 1.05, 1.05, 1.05, 1.05, 1.05};
  double total = channels_last_ ? 3.0 * double(live_.size()) + 3.4 * low_.F
                                : 2.6 * double(live_.size()) + 2.2 * low_.F;
  // One vector of each plane, for each row of taps: beyond a core's cache every load is a wait.
  const bool far = live_.size() * size_t(low_.KH) * size_t(kernels_.vector_bytes) > kNearBytes;
  for (const PixelTile& t : tiles_)
    total += ((t.whole_rows ? slow[3] : slow[t.nf]) * t.nf *
                  double(t.ncols + (low_.accumulate ? 12 : 4)) +
              (far ? kFarLoad * t.ncols : 0.0)) /
             low_.vl;
  return total;
}

void Plan::finish() {
  if (!low_.accumulate) {
    ascending_.resize(filters_.size());
    for (size_t i = 0; i < filters_.size(); ++i) ascending_[filters_[i]] = int(i);
  }
  low_.count = int(low_.form == Form::pixels ? tiles_.size()
                   : pairs()                 ? paired_.size()
                                             : segments_.size());
  low_.segments = segments_.data();
  low_.tiles = tiles_.data();
  low_.gather = gather_.data();
  low_.gathered = gathered_.data();
  low_.paired = low_.form == Form::filters && pairs() ? paired_.data() : nullptr;
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
  if (!pair_tiles_.empty()) {
    pixel_pairs_.tiles = pair_tiles_.data();
    pixel_pairs_.count = low_.count = int(pair_tiles_.size());
    pixel_pairs_.gathers = pair_gathers_.data();
    low_.pixel_pairs = &pixel_pairs_;
  }
  if (parts_.empty()) return;
  winograd_.units = units_.data();
  winograd_.from = from_.data();
  winograd_.parts = parts_.data();
  winograd_.nparts = int(parts_.size());
  winograd_.part0 = part0_.data();
  winograd_.offsets = wino_offsets_.data();
  winograd_.taken = wino_taken_.data();
  winograd_.whole = whole_.data();
  low_.winograd = &winograd_;
}

}  // namespace hetconv
