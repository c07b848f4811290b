// SPDX-License-Identifier: Apache-2.0
// fprop in 8 bits with pixels in vectors, for groups of few filters: of a band come planes of
// pixels (see int8_transpose.h), of these the quads that a group reads, and of what the groups make
// come pixels again.
#pragma once
#include "int8_micro_pixels.h"
#include "int8_pixel_bands.h"
#include "int8_transpose.h"

namespace hetconv {
namespace HETCONV_NS {

struct Int8Pixels {
  const Int8Lowered& L;
  const Int8Problem& p;
  const int8_t* packed;
  const Finish& finish;
  Int8PixelBands bands;
  const int32_t* off = nullptr;

  Int8Pixels(const Int8Lowered& lowered, const Int8Problem& problem, const int8_t* weights,
             const Finish& f)
      : L(lowered), p(problem), packed(weights), finish(f), bands(lowered, problem) {}

  // Where a band is kept. Steps read up to a tile's pixels beyond the last.
  struct Place {
    uint8_t *band, *planes, *quads, *results, *residual;
  };
  Place lay_out(uint8_t* memory) const {
    const Int8PixelRoom room = bands.pixel_room(bands.rows, bands.cols);
    Place at;
    at.band = memory;
    at.planes = at.band + room.band;
    at.quads = at.planes + room.planes;
    at.results = at.quads + room.quads;
    at.residual = at.results + room.results;
    return at;
  }

  // All tiles at once: what a band is transposed into serves every one.
  void compute(int, int, uint8_t* memory, int64_t n, int oy, int ox, int nr, int nc, int*,
               uint8_t* y0) const {
    const Place at = lay_out(memory);
    const int64_t entries = bands.entries(), plane = Int8PixelBands::plane_of(entries);
    const int row = bands.xa.entries;
    const int64_t run = int64_t(nr - 1) * row + nc, result = Int8PixelBands::plane_of(run);
    bands.pack(0, n, oy, ox, nr, nc, at.band);
    planes_of<Woven>(at.band, bands.pixel(0), entries, p.C, at.planes, plane);
    const int64_t first = (int64_t(oy) * p.Wo + ox) * p.F;
    const uint8_t* res = p.res ? p.res + n * int64_t(p.Ho) * p.Wo * p.F + first : nullptr;
    if (res && p.y_type != Int8Out::f32) take_residual(res, nr, nc, row, run, result, at);
    int held = -1;
    for (int i = 0; i < L.tiles; ++i) {
      const Int8PixelTile& t = L.tile[i];
      if (held != t.gather) {
        const Int8Gather& g = L.gather[t.gather];
        for (int q = 0; q < g.quads; ++q)
          gather_quad(at.planes, plane, L.channels + g.channel0 + kQuad * q, entries,
                      at.quads + q * plane * kQuad);
      }
      held = t.gather;
      if (p.y_type == Int8Out::f32)
        floats(t, at.quads, nr, nc, row, reinterpret_cast<float*>(y0) + first, res);
      else
        sweep(t, at, result, run);
    }
    if (p.y_type != Int8Out::f32)
      pixels_of<Straight>(at.results, result, nr, nc, row, p.F, y0 + first, int64_t(p.Wo) * p.F,
                          int64_t(p.F));
  }

  // What is added, in planes like the results; between the rows lies anything.
  void take_residual(const uint8_t* res, int nr, int nc, int row, int64_t run, int64_t result,
                     const Place& at) const {
    const int64_t pitch = bands.staged_pitch(p.F);
    for (int r = 0; r < nr; ++r)
      for (int x = 0; x < nc; ++x)
        memcpy(at.band + (int64_t(r) * row + x) * pitch, res + (int64_t(r) * p.Wo + x) * p.F,
               size_t(p.F));
    planes_of<Straight>(at.band, pitch, run, p.F, at.residual, result);
  }

  Int8Run run_of(const Int8PixelTile& t, const uint8_t* quads, int32_t* sums) const {
    return {quads, off + t.step0, t.steps, packed + t.w0, p.bias + t.filter0, sums};
  }

  // A tile on all pixels of a run.
  void sweep(const Int8PixelTile& t, const Place& at, int64_t result, int64_t run) const {
    const int vectors = int(ceil_div<int64_t>(run, 16)),
              tiles = ceil_div(vectors, kInt8PixelVectors[t.filters]), base = vectors / tiles,
              more = vectors % tiles;
    const Int8RunKernel small = int8_run_for(t.filters, base),
                        big = more ? int8_run_for(t.filters, base + 1) : small;
    const FinishVectors f = vectors_of(finish);
    alignas(64) int32_t sums[kInt8MostSums];
    Int8Run r = run_of(t, at.quads, sums);
    int64_t pixel = 0;
    for (int k = 0; k < tiles; ++k) {
      const int n = base + (k < more);
      (k < more ? big : small)(r);
      for (int i = 0; i < t.filters; ++i) {
        const int64_t to = L.filters[t.filter0 + i] * result + pixel;
        const float multiplier = p.multiplier[t.filter0 + i];
        if (p.res)
          finish_pixels<true>(f, sums + 16 * n * i, n, multiplier, at.residual + to,
                              at.results + to);
        else
          finish_pixels<false>(f, sums + 16 * n * i, n, multiplier, nullptr, at.results + to);
      }
      r.a += 64 * n;
      pixel += 16 * n;
    }
  }

  // The same for a float32 result, one vector after another.
  void floats(const Int8PixelTile& t, const uint8_t* quads, int nr, int nc, int row, float* y,
              const uint8_t* res) const {
    alignas(64) int32_t sums[kInt8TileFilters * 16];
    const Int8RunKernel kernel = int8_run_for(t.filters, 1);
    for (int i = 0; i < nr; ++i)
      for (int x0 = 0; x0 < nc; x0 += 16) {
        kernel(run_of(t, quads + kQuad * (int64_t(i) * row + x0), sums));
        for (int x = x0; x < least(nc, x0 + 16); ++x) {
          int32_t own[kInt8TileFilters];
          for (int f = 0; f < t.filters; ++f) own[f] = sums[16 * f + x - x0];
          Int8Tile one{};
          one.sums = own;
          one.multiplier = p.multiplier + t.filter0;
          const int64_t at = (int64_t(i) * p.Wo + x) * p.F;
          finish_floats(finish, one, y + at, p.F, 1, t.filters, t.filters, L.filters + t.filter0,
                        res ? res + at : nullptr);
        }
      }
  }
};

}  // namespace HETCONV_NS
}  // namespace hetconv
