// SPDX-License-Identifier: Apache-2.0
// Pixels in vectors of bfloat16, two channels of one pixel in a lane: a group of any number of
// filters takes what its live weights take, but every group wants its channels side by side, and
// the image is transposed twice.
#include <algorithm>
#include <map>

#include "plan.h"

namespace hetconv {
namespace {

// In vector operations per pixel, counted from the instructions of transpose_pairs.h and
// fprop_pixel_pairs.h.
constexpr double kStep = 0.6;  // of a step, beside one product for each filter: loads
constexpr double kLane = 1.0 / 16;
constexpr double kGather = 0.19;    // of a pair: 2 loads, 2 permutations and 2 stores for 32 pixels
constexpr double kTranspose = 7.2;  // of 32 channels, to planes or from planes
constexpr double kFinish = 0.75;    // of a filter: what follows the sums
constexpr double kHalo = 1.3;       // pixels that are transposed and gathered, per output pixel
constexpr double kJunk = 1.06;      // pixels that are computed, per output pixel

}  // namespace

void Plan::lower_pixel_pairs() {
  clear();
  low_.form = Form::pixels;
  for (const Group& g : groups_) {
    // Channels with the same taps, so that any two of them make a pair.
    std::map<std::vector<int>, std::vector<int>> channels_of;
    std::vector<std::vector<int>> taps(static_cast<size_t>(low_.C));
    for (const Column& c : g.columns) taps[size_t(c.channel)].push_back(c.ky * low_.KW + c.kx);
    for (int c = 0; c < low_.C; ++c)
      if (!taps[size_t(c)].empty()) channels_of[taps[size_t(c)]].push_back(c);
    PixelPairGather gather{0, int(gathered_.size())};
    std::vector<Column> steps;
    for (const auto& entry : channels_of)
      for (size_t i = 0; i < entry.second.size(); i += 2, ++gather.pairs) {
        const bool two = i + 1 < entry.second.size();
        gathered_.push_back(entry.second[i]);
        gathered_.push_back(two ? entry.second[i + 1] : -1);
        for (int tap : entry.first) {
          Column step{tap / low_.KW, tap % low_.KW, gather.pairs};
          step.idle = two ? 0 : kUpper;
          steps.push_back(step);
        }
      }
    // Row of taps by row: neighbouring taps read the same cache lines.
    std::stable_sort(steps.begin(), steps.end(),
                     [](const Column& a, const Column& b) { return a.ky < b.ky; });
    const int most = kernels_.max_pixel_filters, count = int(g.filters.size()),
              tiles = (count + most - 1) / most;
    const int64_t col0 = int64_t(columns_.size());
    columns_.insert(columns_.end(), steps.begin(), steps.end());
    for (int k = 0, f = 0; k < tiles; ++k) {
      const int filters = count / tiles + (k < count % tiles);
      pair_tiles_.push_back({filters, int(filters_.size()), int(pair_gathers_.size()),
                             int(steps.size()), col0, low_.packed});
      filters_.insert(filters_.end(), g.filters.begin() + f, g.filters.begin() + f + filters);
      f += filters;
      low_.packed += int64_t(steps.size()) * filters;
    }
    pair_gathers_.push_back(gather);
    pixel_pairs_.most_pairs = std::max(pixel_pairs_.most_pairs, gather.pairs);
  }
}

// Whether a band of the fewest pixels fits, whatever the stride and the dilation: see
// PixelPairsFprop::room_of.
bool Plan::fits_pixel_pairs() const {
  const int64_t pixels = int64_t(kFewestPixels) * low_.KH * low_.KW,
                plane = (pixels + 31) / 32 * 32 + 64, channels = (low_.C + 31) / 32 * 32,
                filters = (low_.F + 31) / 32 * 32,
                elements = plane * (2 * std::max(channels, filters) + low_.C + 2 + 2 * filters);
  return 2 * elements <= int64_t(kWorkspaceBytes);
}

double Plan::pixel_pairs_cost() const {
  double total =
      kTranspose * (kHalo * ((low_.C + 31) / 32) + (low_.F + 31) / 32) + kFinish * low_.F;
  for (const PixelPairGather& g : pair_gathers_) total += kHalo * kGather * g.pairs;
  for (const PixelPairTile& t : pair_tiles_) total += kJunk * kLane * t.steps * (t.filters + kStep);
  return total;
}

}  // namespace hetconv
