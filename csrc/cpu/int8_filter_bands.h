// SPDX-License-Identifier: Apache-2.0
// Bands in 8 bits where filters are in vectors: pixels of bytes, in the orders that the blocks
// read. Layers that need neither padding nor another order read memory itself.
#pragma once
#include "int8_band.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int64_t kInt8BandBytes = 192 << 10;
constexpr int kInt8TasksPerThread = 32;
constexpr int kInt8Together = 8;              // blocks that take turns
constexpr int64_t kInt8NearBytes = 18 << 10;  // of their weights
constexpr int kInt8BandsPerThread = 8;        // where all blocks do

struct Int8FilterBands final : Int8Bands {
  bool direct = false;  // blocks in the order of memory read memory
  int64_t widest = 0;   // bytes of a pixel in a band

  using Int8Bands::Int8Bands;

  bool reads_directly(const Int8Block& b) const { return direct && L.order[b.order].identity; }
  int64_t in_pixel(const Int8Block& b) const {
    return reads_directly(b) ? int64_t(p.sw) * p.C : xa.step * pixel(b.order);
  }
  int64_t in_row(const Int8Block& b) const {
    return reads_directly(b) ? int64_t(p.sh) * p.W * p.C
                             : int64_t(ya.step) * xa.entries * pixel(b.order);
  }

  void lay_axes() override {
    axis_shared(&ya, L.KH, p.sh, p.dh, rows);
    if (ya.entries > L.KH * rows) axis_copies(&ya, L.KH, p.sh, p.dh, rows);
    axis_shared(&xa, L.KW, p.sw, p.dw, cols);
    const bool wasteful = xa.entries > L.KW * cols;
    patches = L.span && (wasteful || p.dw != 1);
    if (patches) {
      axis_shared(&xa, 1, 1, 1, cols);
    } else if (wasteful) {
      axis_copies(&xa, L.KW, p.sw, p.dw, cols);
    }
  }
  int64_t band_bytes(int r, int c) const override {
    const int64_t h =
        least<int64_t>((r - 1) * int64_t(p.sh) + (L.KH - 1) * int64_t(p.dh) + 1, int64_t(L.KH) * r);
    const int64_t w =
        least<int64_t>((c - 1) * int64_t(p.sw) + (L.KW - 1) * int64_t(p.dw) + 1, int64_t(L.KW) * c);
    const int64_t patch = L.span ? int64_t(c) * L.KW * L.C : 0;
    return h * most(w * widest, patch);
  }
  size_t room() const override {
    if (!packs) return kSlack;
    return (size_t(ya.entries) * xa.entries * size_t(patches ? L.KW * L.C : widest) + 2 * kSlack -
            1) /
           kSlack * kSlack;
  }

  void look_at_blocks() override {
    direct = p.x_type == Byte::u8 && L.KH == 1 && L.KW == 1 && p.pt == 0 && p.pl == 0 &&
             L.reach <= L.C && (p.Ho - 1) * int64_t(p.sh) < p.H && (p.Wo - 1) * int64_t(p.sw) < p.W;
    for (int i = 0; i < L.blocks; ++i)
      if (!reads_directly(L.block[i])) {
        packs = true;
        widest = most<int64_t>(widest, L.order[L.block[i].order].pitch);
      }
  }

  void fit(int* r, int* c) const override {
    if (!packs) {
      const int64_t pixels = most<int64_t>(28, kInt8BandBytes / L.C);
      *c = int(least<int64_t>(p.Wo, pixels));
      *r = int(most<int64_t>(1, least<int64_t>(p.Ho, pixels / *c)));
      return;
    }
    while (*c > 1 && band_bytes(1, *c) > int64_t(kWorkspaceBytes) / 2) *c = ceil_div(*c, 2);
    // One row of pixels may be a whole batch.
    if (p.Ho == 1 && L.KH == 1 && L.KW == 1)
      *c = int(least<int64_t>(*c, most<int64_t>(28, kInt8BandBytes / widest)));
    while (*c == p.Wo && *r < p.Ho && band_bytes(*r + 1, *c) <= kInt8BandBytes) ++*r;
  }
  int64_t most_pooled_bytes() const override { return 2 * kInt8BandBytes; }

  // How many blocks from `first` on, before `end`, take turns row by row.
  int together(int first, int end) const {
    int64_t bytes = 0;
    int i = first;
    for (; i < end && i < first + kInt8Together; ++i) {
      const Int8Block& b = L.block[i];
      bytes += int64_t(b.quads + 2 * b.shuffles) * b.lanes * kQuad;
      if (i > first && (bytes > kInt8NearBytes || b.order != L.block[first].order)) break;
    }
    return i - first;
  }

  // Shares of the blocks, so that the last task to end does not keep the other threads long.
  int shares_for(int64_t units) const override {
    if (p.threads <= 1) return 1;
    if (units >= kInt8BandsPerThread * int64_t(p.threads) && together(0, L.blocks) == L.blocks)
      return 1;
    const int64_t wanted = kInt8TasksPerThread * int64_t(p.threads);
    return int(least<int64_t>(L.blocks, ceil_div(wanted, most<int64_t>(units, 1))));
  }

  int key() const override { return direct + 2 * patches; }
  void place_steps(int32_t* off) const override {
    for (int i = 0; i < L.blocks; ++i) {
      const Int8Block& b = L.block[i];
      const bool here = reads_directly(b);
      for (int64_t s = b.step0; s < b.step0 + b.quads + b.shuffles; ++s) {
        const Int8Step& step = L.steps[s];
        const int64_t tap = patches ? 0 : xa.start[step.kx];
        off[s] = here ? step.at
                      : int(ya.start[step.ky] * xa.entries * pixel(b.order) + tap * pixel(b.order) +
                            step.at);
      }
    }
  }
};

}  // namespace HETCONV_NS
}  // namespace hetconv
