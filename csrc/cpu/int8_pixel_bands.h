// SPDX-License-Identifier: Apache-2.0
// Bands in 8 bits where pixels are in vectors: a band is transposed into planes of pixels, and
// these into the quads that a group reads, so neighbouring outputs have to read neighbouring
// entries.
#pragma once
#include "int8_band.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int64_t kInt8PixelBytes = 448 << 10;  // of a band and its copies

// Bytes of what is kept of a band.
struct Int8PixelRoom {
  int64_t band, planes, quads, results, residual;
  int64_t all() const { return band + planes + quads + results + residual; }
};

struct Int8PixelBands final : Int8Bands {
  using Int8Bands::Int8Bands;

  // A plane of so many pixels: whole vectors, and as much again as a tile may go beyond the end.
  static int64_t plane_of(int64_t pixels) {
    const int64_t plane = ceil_div<int64_t>(pixels, 64) * 64 + 64;
    return plane % 1024 == 0 ? plane + 64 : plane;
  }
  static int64_t staged_pitch(int channels) { return int64_t(ceil_div(channels, 64)) * 64; }
  Int8PixelRoom pixel_room(int r, int c) const {
    Axis y, x;
    axis_neighbours(&y, L.KH, p.sh, p.dh, r);
    axis_neighbours(&x, L.KW, p.sw, p.dw, c);
    const int64_t pixels = int64_t(y.entries) * x.entries, run = (r - 1) * int64_t(x.entries) + c,
                  results = p.y_type == Int8Out::f32 ? 0 : staged_pitch(p.F) * plane_of(run),
                  in = staged_pitch(p.C);
    return {most(in * plane_of(pixels), p.res ? staged_pitch(p.F) * plane_of(run) : 0),
            in * plane_of(pixels), L.most_quads * plane_of(pixels) * kQuad, results,
            p.res ? results : 0};
  }
  void look_at_blocks() override { packs = true; }
  void lay_axes() override {
    axis_neighbours(&ya, L.KH, p.sh, p.dh, rows);
    axis_neighbours(&xa, L.KW, p.sw, p.dw, cols);
  }
  int64_t band_bytes(int r, int c) const override { return pixel_room(r, c).all(); }
  size_t room() const override { return size_t(pixel_room(rows, cols).all()); }
  void fit(int* r, int* c) const override {
    while (*c > kFewestPixels && band_bytes(1, *c) > kInt8PixelBytes) *c = ceil_div(*c, 2);
    while (*c == p.Wo && *r < p.Ho && band_bytes(*r + 1, *c) <= kInt8PixelBytes) ++*r;
  }
  int64_t most_pooled_bytes() const override { return kInt8PixelBytes; }
  int shares_for(int64_t) const override { return 1; }
  int key() const override { return 4; }
  void place_steps(int32_t* off) const override {
    const int64_t plane = plane_of(entries());
    for (int64_t s = 0; s < L.nsteps; ++s) {
      const Int8Step& step = L.steps[s];
      off[s] = int(kQuad *
                   (step.at * plane + int64_t(ya.start[step.ky]) * xa.entries + xa.start[step.kx]));
    }
  }
};

}  // namespace HETCONV_NS
}  // namespace hetconv
