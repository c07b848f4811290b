// SPDX-License-Identifier: Apache-2.0
// fprop of bfloat16 with pixels in vectors, for groups of few filters: a lane has two channels of
// one pixel. Of a band come planes of pixels (see transpose_pairs.h), of these the pairs that a
// group reads, and of what the groups make come pixels again. Tasks are (image, band of rows, strip
// of columns).
#pragma once
#include "fprop_pooled.h"
#include "micro_pixels.h"
#include "transpose_pairs.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr size_t kPixelPairBytes = 448u << 10;  // of a band and its copies
constexpr int kMostPairSums = 25 * 16;          // of a tile

struct PairRun {
  const float* a;  // pairs of the first pixel
  const int* off;  // of each step
  int steps;
  const float* w;  // [steps][NF]
  float* sums;     // [NF][16 NP]
};

template <int NF, int NP> static void pair_run(const PairRun& t) {
  Vec<float> acc[NF][NP];
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] =
      Vec<float>{};
  const float* w = t.w;
  for (int s = 0; s < t.steps; ++s, w += NF) {
    const float* a = t.a + t.off[s];
    Vec<float> x[NP];
    HC_UNROLL for (int j = 0; j < NP; ++j) x[j] = load<float>(a + 16 * j);
    HC_UNROLL for (int i = 0; i < NF; ++i) {
      const Vec<float> b = splat_both(reinterpret_cast<const bf16*>(w + i));
      HC_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = dot_both(acc[i][j], x[j], b);
    }
  }
  HC_UNROLL for (int i = 0; i < NF; ++i) HC_UNROLL for (int j = 0; j < NP; ++j)
      store<float>(t.sums + 16 * (i * NP + j), acc[i][j]);
}

using PairRunKernel = void (*)(const PairRun&);

static PairRunKernel pair_run_for(int filters, int vectors) {
  return choose<PairRunKernel, kMaxPixelFilters>(filters, [vectors](auto f) {
    constexpr int NF = f();
    return choose<PairRunKernel, kPixelVectors[NF]>(vectors,
                                                    [](auto m) { return pair_run<NF, m()>; });
  });
}

// Has what `Pooled` wants of a form.
struct PixelPairsFprop {
  using Band = bf16;
  const Lowered& L;
  const PixelPairs& X;
  Problem p;
  const float* packed;
  const int* off = nullptr;
  Axis ya{}, xa{};
  int rows = 0, cols = 0;

  PixelPairsFprop(const Lowered& lowered, const Problem& problem, const float* weights)
      : L(lowered), X(*lowered.pixel_pairs), p(problem), packed(weights) {}

  static int64_t plane_of(int64_t pixels) { return ceil_div<int64_t>(pixels, 32) * 32 + 32; }
  static int64_t padded(int channels) { return int64_t(ceil_div(channels, 32)) * 32; }
  int64_t entries() const { return int64_t(ya.entries) * xa.entries; }
  int64_t run_of(int r, int c) const { return int64_t(r - 1) * xa.entries + c; }

  // Elements of two bytes.
  struct Room {
    int64_t band, planes, pairs, results, residual;
    size_t bytes() const { return size_t(band + planes + pairs + results + residual) * 2; }
  };
  Room room_of(int r, int c) const {
    Axis y, x;
    axis_neighbours(&y, L.KH, p.sh, p.dh, r);
    axis_neighbours(&x, L.KW, p.sw, p.dw, c);
    const int64_t plane = plane_of(int64_t(y.entries) * x.entries),
                  results = padded(p.F) * plane_of(int64_t(r - 1) * x.entries + c);
    return {most(padded(p.C) * plane, p.res.data ? results : 0), (padded(p.C) + 1) * plane,
            2 * X.most_pairs * plane, results, p.res.data ? results : 0};
  }

  static constexpr int kTileRows = 1;
  void lay_rows(int r) {
    rows = r;
    axis_neighbours(&ya, L.KH, p.sh, p.dh, rows);
    axis_neighbours(&xa, L.KW, p.sw, p.dw, cols);
  }
  void choose_band() {
    int r = 1;
    cols = p.Wo;
    while (cols > kFewestPixels && room_of(1, cols).bytes() > kPixelPairBytes)
      cols = ceil_div(cols, 2);
    while (cols == p.Wo && r < p.Ho && room_of(r + 1, cols).bytes() <= kPixelPairBytes) ++r;
    int64_t bands = ceil_div(p.Ho, r);
    if (p.N * ceil_div(p.Wo, cols) * bands < p.threads) bands = least<int64_t>(p.Ho, bands * 2);
    lay_rows(int(ceil_div<int64_t>(p.Ho, bands)));
  }
  bool has_bands() const { return cols == p.Wo && p.y.sc == 1; }
  size_t room_for_band() const { return room_of(rows, cols).bytes(); }
  size_t room_for_scratch() const { return 0; }

  void find_offsets(OffsetCache* cache) {
    const int64_t plane = plane_of(entries());
    OffsetKey key;
    memset(&key, 0, sizeof key);
    key.v[0] = int(plane);
    key.v[1] = xa.entries;
    key.v[2] = 1;
    for (int k = 0; k < L.KH; ++k) key.v[4 + k] = ya.start[k];
    for (int k = 0; k < L.KW; ++k) key.v[4 + kMaxKernel + k] = xa.start[k];
    off = offsets_find(cache, key);
    if (off) return;
    int* fresh = static_cast<int*>(malloc(sizeof(int) * size_t(L.ncolumns + 1)));
    if (!fresh) out_of_memory();
    for (int64_t i = 0; i < L.ncolumns; ++i) {
      const Column& c = L.columns[i];
      fresh[i] = int(c.channel * plane + int64_t(ya.start[c.ky]) * xa.entries + xa.start[c.kx]);
    }
    off = offsets_keep(cache, key, fresh, sizeof(int) * size_t(L.ncolumns + 1));
  }

  Ahead input_of_rows(int64_t, int) const { return {}; }
  void compute_rows(int64_t n, int oy, int nr, Band* memory, float*, Ahead&) {
    compute(memory, n, oy, 0, nr, cols);
  }

  void compute(Band* memory, int64_t n, int oy, int ox, int nr, int nc) const {
    const Room room = room_of(rows, cols);
    Band *band = memory, *planes = band + room.band;
    float* pairs = reinterpret_cast<float*>(planes + room.planes);
    Band *results = planes + room.planes + room.pairs, *residual = results + room.results;
    const int64_t plane = plane_of(entries()), run = run_of(nr, nc), result = plane_of(run);
    const bf16* x = reinterpret_cast<const bf16*>(p.x.data) + n * p.x.sn;
    pack_channels_last<bf16, bf16>(p, x, ya, xa, oy, ox, nr, nc, int(padded(p.C)), band);
    planes_of<Halves>(band, padded(p.C), entries(), p.C, planes, plane);
    bf16* zeros = planes + padded(p.C) * plane;
    zero_fill(zeros, plane);
    if (p.res.data) take_residual(n, oy, ox, nr, nc, band, residual, result);
    int held = -1;
    for (int i = 0; i < X.count; ++i) {
      const PixelPairTile& t = X.tiles[i];
      if (held != t.gather) {
        const PixelPairGather& g = X.gathers[t.gather];
        const int* channels = L.gathered + g.channel0;
        for (int q = 0; q < g.pairs; ++q) {
          const bf16* lower = planes + channels[2 * q] * plane;
          const int upper = channels[2 * q + 1];
          gather_pair(lower, upper < 0 ? zeros : planes + upper * plane, entries(),
                      pairs + q * plane);
        }
      }
      held = t.gather;
      sweep(t, pairs, p.res.data ? residual : nullptr, results, result, run);
    }
    bf16* y = reinterpret_cast<bf16*>(p.y.data) + n * p.y.sn + oy * p.y.sh + ox * p.y.sw;
    if (p.y.sc == 1)
      return pixels_of<Halves>(results, result, nr, nc, xa.entries, p.F, y, p.y.sh, p.y.sw);
    for (int f = 0; f < p.F; ++f)
      for (int r = 0; r < nr; ++r)
        for (int c = 0; c < nc; ++c)
          y[f * p.y.sc + r * p.y.sh + c * p.y.sw] =
              results[f * result + int64_t(r) * xa.entries + c];
  }

  // What is added, in planes like the results; between the rows lies anything.
  void take_residual(int64_t n, int oy, int ox, int nr, int nc, Band* staged, Band* planes,
                     int64_t plane) const {
    const bf16* res =
        reinterpret_cast<const bf16*>(p.res.data) + n * p.res.sn + oy * p.res.sh + ox * p.res.sw;
    const int64_t pitch = padded(p.F);
    for (int r = 0; r < nr; ++r)
      for (int c = 0; c < nc; ++c) {
        bf16* to = staged + (int64_t(r) * xa.entries + c) * pitch;
        const bf16* from = res + r * p.res.sh + c * p.res.sw;
        if (p.res.sc == 1)
          memcpy(static_cast<void*>(to), from, size_t(p.F) * sizeof(bf16));
        else
          for (int f = 0; f < p.F; ++f) to[f] = from[f * p.res.sc];
      }
    planes_of<Halves>(staged, pitch, run_of(nr, nc), p.F, planes, plane);
  }

  // A tile on all pixels of a run.
  void sweep(const PixelPairTile& t, const float* pairs, const Band* residual, Band* results,
             int64_t result, int64_t run) const {
    const int vectors = int(ceil_div<int64_t>(run, 16)),
              tiles = ceil_div(vectors, kPixelVectors[t.filters]), base = vectors / tiles,
              more = vectors % tiles;
    const PairRunKernel small = pair_run_for(t.filters, base),
                        big = more ? pair_run_for(t.filters, base + 1) : small;
    const Out<float> out = out_of<float>(p);
    alignas(64) float sums[kMostPairSums];
    PairRun r{pairs, off + t.col0, t.steps, packed + t.w0, sums};
    int64_t pixel = 0;
    for (int k = 0; k < tiles; ++k) {
      const int count = base + (k < more);
      (k < more ? big : small)(r);
      for (int i = 0; i < t.filters; ++i) {
        const int f = L.filters[t.filter0 + i];
        const int64_t to = f * result + pixel;
        const Vec<float> scale = splat<float>(out.scale ? out.scale[f] : 1.0f),
                         shift = splat<float>(out.shift ? out.shift[f] : 0.0f);
        for (int j = 0; j < count; ++j) {
          Vec<float> v = load<float>(sums + 16 * (count * i + j));
          if (out.scale) v *= scale;
          if (out.shift) v += shift;
          if (residual) v += read<bf16, float>(residual + to + 16 * j);
          write<bf16, float>(results + to + 16 * j, activate<float>(v, out.act));
        }
      }
      r.a += 16 * count;
      pixel += 16 * count;
    }
  }

  void run(OffsetCache* cache) {
    choose_band();
    find_offsets(cache);
    const int64_t bands = ceil_div(p.Ho, rows), strips = ceil_div(p.Wo, cols),
                  tasks = p.N * bands * strips;
    const size_t bytes = room_for_band();
    Tasks queue(tasks, p.threads);
    in_parallel(least<int64_t>(p.threads, tasks), [&](int self) {
      Band* memory = static_cast<Band*>(workspace(bytes));
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int oy = int(task / strips % bands) * rows, ox = int(task % strips) * cols;
        compute(memory, task / (bands * strips), oy, ox, least(rows, p.Ho - oy),
                least(cols, p.Wo - ox));
      }
    });
  }
};

static bool fprop_pixel_pairs(const Lowered& L, OffsetCache* cache, const Problem& p,
                              const void* packed) {
  PixelPairsFprop form(L, p, static_cast<const float*>(packed));
  if (p.pool) return Pooled<bf16, float, PixelPairsFprop>(form).run(cache);
  form.run(cache);
  return true;
}

// Weights of two channels in a lane, [steps][filters].
template <class S>
static void pack_pixel_pairs(const Lowered& L, const WeightView& v, float* out, int threads) {
  const PixelPairs& X = *L.pixel_pairs;
  const S* w = reinterpret_cast<const S*>(v.data);
  each_in_parallel(X.count, L.packed > (1 << 16) ? threads : 1, [&](int64_t i) {
    const PixelPairTile& t = X.tiles[i];
    const int* channels = L.gathered + X.gathers[t.gather].channel0;
    float* to = out + t.w0;
    for (int s = 0; s < t.steps; ++s) {
      const Column& c = L.columns[t.col0 + s];
      for (int f = 0; f < t.filters; ++f, ++to) {
        uint32_t both = 0;
        for (int half = 0; half < 2; ++half)
          if (!idle_of(c, half))
            both |=
                half_of<S>(w + L.filters[t.filter0 + f] * v.sf +
                               channels[2 * c.channel + half] * v.sc + c.ky * v.sh + c.kx * v.sw,
                           half);
        memcpy(to, &both, sizeof both);
      }
    }
  });
}

}  // namespace HETCONV_NS
}  // namespace hetconv
