// SPDX-License-Identifier: Apache-2.0
// Pixels in vectors, in 8 bits: a group of any number of filters takes what its live weights take,
// but every group wants its channels side by side, and the image is transposed twice.
#include <algorithm>
#include <map>

#include "int8_plan.h"

namespace hetconv {
namespace {

// In vector operations of 64 bytes, per pixel. Counted from the instructions of int8_transpose.h
// and int8_micro_pixels.h.
constexpr double kStep = 0.6;  // of a step, beside one product for each filter: loads
constexpr double kLanes = 1.0 / 16;
constexpr double kGather = 0.19;      // of a quad: 4 loads, 8 unpackings and 4 stores for 64 pixels
constexpr double kTransposeIn = 9.0;  // of 64 channels, to planes
constexpr double kTransposeOut = 8.0;  // of 64 filters, from planes
constexpr double kFinishOne = 0.45;    // of a filter: requantised and written
constexpr double kHalo = 1.3;          // pixels that are transposed and gathered, per output pixel
constexpr double kJunk = 1.06;         // pixels that are computed, per output pixel

}  // namespace

// The channels that a part reads, in sets of which all have the same taps.
std::vector<std::vector<int>> Int8Plan::by_taps(const Int8Part& part) const {
  const int C = low_.C, taps = tap_count();
  std::vector<std::vector<bool>> seen(size_t(C), std::vector<bool>(size_t(taps), false));
  std::map<std::vector<bool>, std::vector<int>> found;
  for (int c = 0; c < C; ++c) {
    bool any = false;
    for (int t = 0; t < taps; ++t) {
      const size_t bit = size_t(t) * C + c;
      const bool on = part.columns[bit / 64] >> bit % 64 & 1;
      seen[size_t(c)][size_t(t)] = on;
      any |= on;
    }
    if (any) found[seen[size_t(c)]].push_back(c);
  }
  std::vector<std::vector<int>> sets;
  for (auto& entry : found) sets.push_back(std::move(entry.second));
  std::sort(sets.begin(), sets.end());
  return sets;
}

Int8Plan::Lowering Int8Plan::lower_pixels(const std::vector<Int8Part>& groups) const {
  const int C = low_.C, taps = tap_count();
  Lowering to;
  Int8Order staged{};
  staged.channels = C;
  staged.identity = 1;
  staged.pitch = (C + 63) / 64 * 64;
  to.orders.push_back(staged);
  to.cost = kHalo * kTransposeIn * (staged.pitch / 64) + kTransposeOut * ((low_.F + 63) / 64) +
            kFinishOne * low_.F;
  for (const Int8Part& group : groups) {
    const std::vector<std::vector<int>> sets = by_taps(group);
    const Int8Gather gather{0, int64_t(to.channels.size())};
    const int number = int(to.gathers.size());
    std::vector<Int8Step> steps;
    int quads = 0;
    for (const std::vector<int>& set : sets)
      for (size_t i = 0; i < set.size(); i += kQuad, ++quads) {
        const int some = int(std::min<size_t>(kQuad, set.size() - i));
        for (int j = 0; j < kQuad; ++j)
          to.channels.push_back(set[i + size_t(std::min(j, some - 1))]);
        for (int t = 0; t < taps; ++t) {
          const size_t bit = size_t(t) * C + set[i];
          if (group.columns[bit / 64] >> bit % 64 & 1)
            steps.push_back(Int8Step{int16_t(t / low_.KW), int16_t(t % low_.KW), quads,
                                     uint8_t((1 << some) - 1)});
        }
      }
    // Tap by tap: neighbouring taps read the same cache lines.
    std::stable_sort(steps.begin(), steps.end(),
                     [](const Int8Step& a, const Int8Step& b) { return a.ky < b.ky; });
    to.gathers.push_back(gather);
    to.gathers.back().quads = quads;
    to.most_quads = std::max(to.most_quads, quads);
    to.cost += kHalo * kGather * quads;
    const int count = int(group.filters.size()),
              tiles = (count + kInt8TileFilters - 1) / kInt8TileFilters;
    const int64_t step0 = int64_t(to.steps.size());
    to.steps.insert(to.steps.end(), steps.begin(), steps.end());
    for (int k = 0, f = 0; k < tiles; ++k) {
      Int8PixelTile tile{};
      tile.filters = count / tiles + (k < count % tiles);
      tile.filter0 = int(to.filters.size());
      tile.gather = number;
      tile.steps = int(steps.size());
      tile.step0 = step0;
      tile.w0 = to.packed;
      to.filters.insert(to.filters.end(), group.filters.begin() + f,
                        group.filters.begin() + f + tile.filters);
      f += tile.filters;
      to.packed += int64_t(tile.steps) * tile.filters * kQuad;
      to.cost += kJunk * tile.steps * kLanes * (tile.filters + kStep);
      to.tiles.push_back(tile);
    }
  }
  // A band of the fewest pixels, whatever stride and dilation: see Int8PixelBands::pixel_room.
  const int64_t pixels = int64_t(kFewestPixels) * taps, plane = (pixels + 63) / 64 * 64 + 128,
                filters = (low_.F + 63) / 64 * 64,
                bytes = plane * (2 * std::max<int64_t>(staged.pitch, filters) +
                                 int64_t(kQuad) * to.most_quads + 2 * filters);
  return bytes <= int64_t(kWorkspaceBytes) ? to : Lowering{};
}

}  // namespace hetconv
