// SPDX-License-Identifier: Apache-2.0
// fprop in 8 bits with filters in vectors: blocks of filters that read a band, or memory itself.
#pragma once
#include "int8_filter_bands.h"

namespace hetconv {
namespace HETCONV_NS {

using Int8TileKernel = void (*)(const Int8Tile&, const Finish&);

template <int U, int... p>
static Int8TileKernel int8_tile_of(int pixels, std::integer_sequence<int, p...>) {
  static const Int8TileKernel table[] = {int8_tile<p + 1, U>...};
  return table[pixels - 1];
}
template <int U> static Int8TileKernel int8_tile_for(int pixels) {
  return int8_tile_of<U>(pixels, std::make_integer_sequence<int, kInt8Pixels[U]>());
}
static inline Int8TileKernel int8_tile_for(int units, int pixels) {
  if constexpr (kInt8Units == 4) {
    if (units == 4) return int8_tile_for<4>(pixels);
    if (units == 3) return int8_tile_for<3>(pixels);
  }
  if constexpr (kInt8Units >= 2)
    if (units == 2) return int8_tile_for<2>(pixels);
  return int8_tile_for<1>(pixels);
}

struct Int8Filters {
  const Int8Lowered& L;
  const Int8Problem& p;
  const int8_t* packed;
  const Finish& finish;
  Int8FilterBands bands;
  const int32_t* off = nullptr;

  Int8Filters(const Int8Lowered& lowered, const Int8Problem& problem, const int8_t* weights,
              const Finish& f)
      : L(lowered), p(problem), packed(weights), finish(f), bands(lowered, problem) {}

  // What a tile makes goes through here where its filters are no whole row of neighbours.
  struct Scratch {
    static constexpr int pixels = 16, lanes = kInt8Units * kUnit;
    alignas(64) int32_t sums[pixels * lanes];
    alignas(64) uint8_t bytes[pixels * lanes], added[pixels * lanes];
  };

  // A block on rows [oy, ...) and `nc` columns from ox on of image n; `band` holds their input.
  struct Sweep {
    const Int8Block* b;
    Int8Tile t;
    const uint8_t *a0, *res0;
    uint8_t* y0;
    int64_t in_row, in_pixel;
    int tiles, base, more;
    bool floats, whole;
    Int8TileKernel small, big;
  };

  Sweep sweep(const Int8Block& b, const uint8_t* band, int64_t n, int oy, int ox, int nc,
              uint8_t* y0, Scratch& scratch) const {
    Sweep s{};
    s.b = &b;
    s.in_row = bands.in_row(b);
    s.in_pixel = bands.in_pixel(b);
    s.a0 = bands.reads_directly(b)
               ? p.x + ((n * p.H + int64_t(oy) * p.sh) * p.W + int64_t(ox) * p.sw) * p.C
               : band;
    s.floats = p.y_type == Int8Out::f32;
    s.whole = b.contiguous && b.filters == b.lanes && !s.floats;
    const int64_t at = (int64_t(oy) * p.Wo + ox) * p.F;
    s.y0 = y0 + at * (s.floats ? 4 : 1);
    s.res0 = p.res ? p.res + n * int64_t(p.Ho) * p.Wo * p.F + at : nullptr;
    const int units = b.lanes / kUnit, widest = kInt8Pixels[units];
    s.tiles = ceil_div(nc, widest);
    s.base = nc / s.tiles;
    s.more = nc % s.tiles;
    s.small = int8_tile_for(units, s.base);
    s.big = s.more ? int8_tile_for(units, s.base + 1) : s.small;
    Int8Tile& t = s.t;
    t.pitch = s.in_pixel;
    t.off = off + b.step0;
    t.quads = b.quads;
    t.shuffles = b.shuffles;
    if (neighbours(b.triples, b.twins, t.off + b.quads, 1, s.in_pixel)) {
      t.triples = b.triples;
      t.twins = b.twins;
    }
    t.w = packed + b.w0;
    t.bias = p.bias + b.filter0;
    t.multiplier = p.multiplier + b.filter0;
    t.y_pitch = t.res_pitch = s.whole ? p.F : b.lanes;
    t.sums = s.floats ? scratch.sums : nullptr;
    return s;
  }

  // The bytes of a tile, from its lanes to the filters of y, and back.
  void spread(const Int8Block& b, const uint8_t* tile, int pixels, uint8_t* y) const {
#if defined(__AVX512BW__)
    if (b.spreads)
      return permute_spread(tile, pixels, b.lanes, L.spread + b.spread0, b.spreads, y, p.F);
#endif
    spread_filters(tile, pixels, b.lanes, b.filters, L.filters + b.filter0, b.contiguous, y, p.F);
  }
  void collect(const Int8Block& b, const uint8_t* y, int pixels, uint8_t* tile) const {
#if defined(__AVX512BW__)
    if (b.spreads)
      return permute_collect(tile, pixels, b.lanes, L.spread + b.spread0, b.spreads, y, p.F);
#endif
    collect_filters(tile, pixels, b.lanes, b.filters, L.filters + b.filter0, y, p.F);
  }

  void row(Sweep& s, int r, Scratch& scratch) const {
    const Int8Block& b = *s.b;
    const int* ids = L.filters + b.filter0;
    const int64_t at = int64_t(r) * p.Wo * p.F;
    const uint8_t* res = s.res0 ? s.res0 + at : nullptr;
    uint8_t* y = s.y0 + at * (s.floats ? 4 : 1);
    Int8Tile& t = s.t;
    t.a = s.a0 + r * s.in_row;
    for (int i = 0; i < s.tiles; ++i) {
      const int pixels = s.base + (i < s.more);
      const Int8TileKernel tile = i < s.more ? s.big : s.small;
      if (s.whole) {
        t.y = y + ids[0];
        t.res = res ? res + ids[0] : nullptr;
        tile(t, finish);
      } else if (s.floats) {
        tile(t, finish);
        finish_floats(finish, t, reinterpret_cast<float*>(y), p.F, pixels, b.lanes, b.filters, ids,
                      res);
      } else {
        t.y = scratch.bytes;
        t.res = res ? scratch.added : nullptr;
        if (res) collect(b, res, pixels, scratch.added);
        tile(t, finish);
        spread(b, scratch.bytes, pixels, y);
      }
      t.a += pixels * s.in_pixel;
      y += int64_t(pixels) * p.F * (s.floats ? 4 : 1);
      if (res) res += int64_t(pixels) * p.F;
    }
  }

  // Blocks [b0, b1); `held`: the order that is in the band already, or -1. Blocks that read the
  // same band and whose weights stay in the nearest cache together take turns row by row: then
  // what they read, add and write is there, too.
  void compute(int b0, int b1, uint8_t* band, int64_t n, int oy, int ox, int nr, int nc, int* held,
               uint8_t* y0) const {
    Scratch scratch;
    if (p.res) memset(scratch.added, 0, sizeof scratch.added);
    Sweep some[kInt8Together];
    for (int i = b0; i < b1;) {
      const Int8Block& b = L.block[i];
      const int count = bands.together(i, b1);
      if (!bands.reads_directly(b) && *held != b.order) {
        bands.pack(b.order, n, oy, ox, nr, nc, band);
        *held = b.order;
      }
      for (int k = 0; k < count; ++k)
        some[k] = sweep(L.block[i + k], band, n, oy, ox, nc, y0, scratch);
      for (int r = 0; r < nr; ++r)
        for (int k = 0; k < count; ++k) row(some[k], r, scratch);
      i += count;
    }
  }
};

}  // namespace HETCONV_NS
}  // namespace hetconv
