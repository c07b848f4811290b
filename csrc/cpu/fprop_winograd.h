// SPDX-License-Identifier: Apache-2.0
// fprop by Winograd's F(MxM, 3x3) or F(3x3, 4x4) with filters in vectors (see winograd.h). Tasks
// are (images, band of rows, strip of columns, share of the segments); a band is packed as ever, or
// by phases, and what is not transformed is computed from it first.
#pragma once
#include "fprop_pooled.h"
#include "winograd_bands.h"

namespace hetconv {
namespace HETCONV_NS {

// What is multiplied by Winograd: K of FiltersFprop, and the products of transformed channels.
template <class A> struct WinogradColumns : FilterColumns<A> {
  // Whether a segment has anything that is not transformed.
  static bool has_rest(const FilterSegment& s) {
    return s.quads + s.singles + s.split + s.straight + s.permuted > 0 || s.paired();
  }
  // Vectors of weights that a column has: the columns of a pair share two.
  static int vectors_of(const WinogradPart& k) { return k.pairs ? 2 : k.nv; }
  template <int NV> static FilterSteps<A> products(const Winograd& W, const WinogradPart& k) {
    static const int none[2] = {0, 0};
    return {W.offsets + k.off0,        k.quads, k.singles, 0,      0, 0,
            NV == 1 ? &k.pairs : none, none,    false,     nullptr};
  }
  // One vector of filters, two products a load.
  template <int MR>
  static void pairs_product(const A* a, ptrdiff_t ps, const FilterSteps<A>& s, const A* w, A* o,
                            ptrdiff_t) {
    pairs_kernel<A, MR, 1>(a, ps, s, s.off, w, o);
  }
  template <int NV> static FiltersKernel<A> products_kernel(const WinogradPart& k, int n) {
    if (!k.pairs) return filters_kernel_for<A, NV>(n);
    return choose<FiltersKernel<A>, kMaxPixels>(n, [](auto m) { return pairs_product<m()>; });
  }
};

template <class S, class A, int M, class K = WinogradColumns<A>>
struct WinogradFprop : WinogradBands<S, A, M, K> {
  using Base = WinogradBands<S, A, M, K>;
  using Base::cols;
  using Base::image;
  using Base::images;
  using Base::in_pixel;
  using Base::in_row;
  using Base::kPositions;
  using Base::kSumsBytes;
  using Base::L;
  using Base::off;
  using Base::p;
  using Base::packed;
  using Base::past_caches;
  using Base::rows;
  using Base::W;
  using typename Base::Band;
  using typename Base::Place;
  using Segment = typename K::Segment;
  template <int NV> static constexpr ptrdiff_t kSumsPitch = Base::template kSumsPitch<NV>;

  using Base::Base;

  // What is brought near ahead of its use: a chunk's outputs of some vectors of filters.
  struct Outputs {
    TileChunk tiles;
    const int* filters;
    int vectors;
  };

  void transform(const WinogradUnit& u, const TileBlock& b, const Place& at) const {
    const int width = u.vectors * VL<A>;
    const ptrdiff_t pitch = position_pitch<Band>(b.tiles, width);
    for (int m = 0; m < b.images; ++m)
      for (int r = 0; r < b.tr; ++r)
        for (int v = 0; v < u.vectors; ++v)
          transform_inputs<Band, A, M>(
              image(at, m) + M * r * in_row + W.from[u.from0 + v], in_row, in_pixel, b.tc,
              at.inputs + (ptrdiff_t(m) * b.tr + r) * b.tc * width + v * VL<A>, width, pitch);
  }

  // What is not transformed, to scratch: [image][row][column][nv * VL].
  template <int NV> void compute_rest(const Segment& s, const TileBlock& b, const Place& at) const {
    constexpr int FT = NV * VL<A>;
    const auto steps = K::steps(L, s, off);
    const int tiles = ceil_div(b.nc, kMaxPixels), base = b.nc / tiles, more = b.nc % tiles;
    const auto big = K::template kernel<NV>(least(base + 1, kMaxPixels)),
               small = K::template kernel<NV>(base);
    A* o = at.scratch;
    for (int m = 0; m < b.images; ++m)
      for (int r = 0; r < b.nr; ++r) {
        const Band* a = image(at, m) + r * in_row;
        for (int t = 0; t < tiles; ++t) {
          const int n = base + (t < more);
          (t < more ? big : small)(a, in_pixel, steps, packed + s.w0, o, FT);
          a += n * in_pixel;
          o += n * FT;
        }
      }
  }

  // The products of all positions for a chunk's tiles, to sums: [position][tile][NV * VL].
  template <int NV>
  void multiply(const WinogradPart& k, const TileBlock& b, const TileChunk& c, const Place& at,
                const Outputs& next, Ahead& ahead) const {
    const int width = W.units[k.unit].vectors * VL<A>, columns = 4 * k.quads + k.singles + k.pairs;
    const auto steps = K::template products<NV>(W, k);
    const ptrdiff_t from = position_pitch<Band>(b.tiles, width),
                    weights = ptrdiff_t(columns) * K::vectors_of(k) * VL<A>;
    const auto kernel = K::template products_kernel<NV>(k, c.tiles);
    const Band* a = at.inputs + ptrdiff_t(c.first) * width;
    const A* w = packed + k.w0;
    TileAt<M> near(b, next.tiles.first);
    int fetched = 0;
    for (int q = 0; q < kPositions; ++q, a += from, w += weights) {
      Ahead::step<false>(ahead);
      for (; fetched < (q + 1) * next.tiles.tiles / kPositions; ++fetched, near.next(b))
        fetch_outputs(p, past_caches, b, near, next);
      kernel(a, width, steps, w, at.sums + q * kSumsPitch<NV>, NV * VL<A>);
    }
  }
  // Brings the outputs of a tile near, and what is added to them. Always inline: GCC takes a
  // function of nothing but prefetches for one without effects, and leaves out its calls.
  HC_INLINE void fetch_outputs(const Problem& p, bool past_caches, const TileBlock& b,
                               const TileAt<M>& at, const Outputs& next) {
    const ptrdiff_t y = at.place(b, p.y), res = at.place(b, p.res);
    for (int v = 0; v < next.vectors; ++v) {
      const int f = next.filters[v * VL<A>];
      const S* to = reinterpret_cast<const S*>(p.y.data) + y + f;
      const S* more = reinterpret_cast<const S*>(p.res.data) + res + f;
      if (!past_caches || f % VL<A> != 0)
        HC_UNROLL for (int k = 0; k < M * M; ++k)
            __builtin_prefetch(to + k / M * p.y.sh + k % M * p.y.sw, 1, 2);
      if (p.res.data)
        HC_UNROLL for (int k = 0; k < M * M; ++k)
            __builtin_prefetch(more + k / M * p.res.sh + k % M * p.res.sw, 0, 2);
    }
  }

  void put(const TileBlock& b, const TileChunk& c, const TileSums<A>& from, bool add,
           const Lanes<S, A>& lanes) const {
    if (p.pool) return pool(b, c, add ? from : without_rest(from), lanes);
    if (!lanes.simple()) return scratch_tiles<A, M>(b, c, from, add);
    if constexpr (kNonTemporalStores && sizeof(S) == sizeof(A))
      if (past_caches && lanes.filters[0] % VL<A> == 0)
        return put_tiles(b, c, from, add, SimpleNonTemporal<A>(lanes), lanes.filters[0]);
    put_tiles(b, c, from, add, Simple<S, A>(lanes), lanes.filters[0]);
  }
  template <class End>
  void put_tiles(const TileBlock& b, const TileChunk& c, const TileSums<A>& from, bool add,
                 const End& e, int f0) const {
    if (add)
      p.res.data ? output_tiles<S, A, M, true, true>(p, b, c, from, e, f0)
                 : output_tiles<S, A, M, true, false>(p, b, c, from, e, f0);
    else
      p.res.data ? output_tiles<S, A, M, false, true>(p, b, c, from, e, f0)
                 : output_tiles<S, A, M, false, false>(p, b, c, from, e, f0);
  }
  static TileSums<A> without_rest(TileSums<A> from) {
    from.rest = nullptr;
    return from;
  }
  void pool(const TileBlock& b, const TileChunk& c, const TileSums<A>& from,
            const Lanes<S, A>& lanes) const {
    if constexpr (M % 2 == 0) {  // tiles of three outputs are made of no windows
      if (lanes.simple())
        pool_tiles<S, A, M>(p, b, c, from, Simple<S, A>(lanes), lanes.filters[0]);
      else
        pool_tiles<S, A, M>(p, b, c, from, lanes, 0);
    }
  }

  const int* filters_of(const WinogradPart& k) const {
    return L.filters + K::segments(L)[k.segment].filter0 + k.vector * VL<A>;
  }
  const WinogradPart* after(const WinogradPart* k) const {
    return k + 1 < W.parts + W.nparts ? k + 1 : nullptr;
  }
  // What a part adds to, or makes of, its segment's filters: chunk by chunk, so that sums are
  // transformed while they are in the first cache. following: whose outputs are made next, or null.
  template <int PV>
  void part(const WinogradPart& k, const Segment& s, const Lanes<S, A>* lanes, bool rest,
            const WinogradPart* following, const TileBlock& b, const Place& at,
            Ahead& ahead) const {
    const int ft = s.nv * VL<A>, chunks = ceil_div(b.tiles, kMaxPixels);
    const auto chunk = [&](int i) {
      const int first = int(int64_t(b.tiles) * i / chunks);
      return TileChunk{first, int(int64_t(b.tiles) * (i + 1) / chunks) - first};
    };
    const bool fetch = !p.pool && p.y.sc == 1 && p.y.sn != 0;  // else they are near already
    for (int i = 0; i < chunks; ++i) {
      const TileChunk c = chunk(i);
      const bool last = i + 1 == chunks;
      const WinogradPart* then = last ? following : &k;
      Outputs next{};
      if (fetch && then) next = {chunk(last ? 0 : i + 1), filters_of(*then), then->nv};
      multiply<PV>(k, b, c, at, next, ahead);
      for (int j = 0; j < PV; ++j) {
        const int v = k.vector + j;
        const TileSums<A> from{at.sums + j * VL<A>, PV * VL<A>, kSumsPitch<PV>,
                               at.scratch + v * VL<A>, ft};
        put(b, c, from, rest, lanes[v]);
      }
    }
  }

  template <int NV>
  void segment(int number, const TileBlock& b, const Place& at, int* held, Ahead& ahead) const {
    constexpr int FT = NV * VL<A>;
    const Segment& s = K::segments(L)[number];
    const int* filters = L.filters + s.filter0;
    const WinogradPart *first = W.parts + W.part0[number], *last = W.parts + W.part0[number + 1];
    int covered = 0;
    for (const WinogradPart* k = first; k < last; ++k) covered += k->nv;
    const bool rest = covered < s.nv || K::has_rest(s);
    if (rest) compute_rest<NV>(s, b, at);
    const Out<A> out = out_of<A>(p);
    const auto lanes_of = [&](int v) {
      v = least(v, NV - 1);
      return Lanes<S, A>(out, filters + v * VL<A>, least(VL<A>, s.lanes - v * VL<A>), s.contiguous);
    };
    const Lanes<S, A> lanes[2] = {lanes_of(0), lanes_of(1)};
    bool done[2] = {false, false};
    for (const WinogradPart* k = first; k < last; ++k) {
      if (*held != k->unit) transform(W.units[k->unit], b, at);
      *held = k->unit;
      if (k->nv == 2)
        part<2>(*k, s, lanes, rest, after(k), b, at, ahead);
      else
        part<1>(*k, s, lanes, rest, after(k), b, at, ahead);
      for (int v = k->vector; v < k->vector + k->nv; ++v) done[v] = p.pool || lanes[v].simple();
    }
    if (!p.pool) return emit<NV>(s, b, at, done);
    for (int v = 0; v < NV; ++v)
      if (!done[v])
        pool(b, {0, b.tiles}, TileSums<A>{nullptr, 0, 0, at.scratch + v * VL<A>, FT}, lanes[v]);
  }
  // What is not yet in the output goes there from scratch.
  template <int NV>
  void emit(const Segment& s, const TileBlock& b, const Place& at, const bool* done) const {
    constexpr int FT = NV * VL<A>;
    const int* filters = L.filters + s.filter0;
    const Out<A> out = out_of<A>(p);
    const int pixels = b.nr * b.nc;
    const bool transposed = this->transposes();
    for (int m = 0; m < b.images; ++m) {
      const int64_t n = b.n + m, y = n * p.y.sn + b.oy * p.y.sh + b.ox * p.y.sw,
                    res = n * p.res.sn + b.oy * p.res.sh + b.ox * p.res.sw;
      const A* from = at.scratch + ptrdiff_t(m) * pixels * FT;
      if (transposed) {
        A* transposed = at.scratch + this->outputs_bytes(rows, cols) / sizeof(A) / 2;
        const ptrdiff_t pitch = ceil_div(pixels, VL<A>) * VL<A>;
        transpose_scratch<A>(from, FT, pixels, s.lanes, transposed, pitch);
        for (int f = 0; f < s.lanes; ++f)
          emit_rows<S, A>(out, filters[f], transposed + f * pitch, b.nc, b.nr, b.nc, y, res);
        continue;
      }
      for (int v = 0; v < s.nv; ++v)
        if (!done[v])
          emit_pixels<S, A>(out, filters + v * VL<A>, least(VL<A>, s.lanes - v * VL<A>),
                            s.contiguous, from + v * VL<A>, FT, b.nr, b.nc, y, res);
    }
  }

  void compute(const TileBlock& b, const Place& at, int s0, int s1, int* held, Ahead& ahead) const {
    for (int s = s0; s < s1; ++s)
      if (K::segments(L)[s].nv == 2)
        segment<2>(s, b, at, held, ahead);
      else
        segment<1>(s, b, at, held, ahead);
  }
  void compute_rows(int64_t n, int oy, int nr, Band* band, A* scratch, Ahead& ahead) const {
    Place at = this->lay_out(reinterpret_cast<char*>(band));
    at.sums = scratch;
    at.scratch = scratch + kSumsBytes / sizeof(A);
    for (int ox = 0; ox < p.Wo; ox += cols) {
      const TileBlock b = this->block_of(n, 1, oy, ox, nr, least(cols, p.Wo - ox));
      this->pack(b, at);
      int held = -1;
      compute(b, at, 0, L.count, &held, ahead);
    }
  }

  void run(OffsetCache* cache) {
    this->choose_band();
    this->find_offsets(cache);
    past_caches = non_temporal<S, A>(p);
    const int64_t bands = ceil_div(p.Ho, rows), strips = ceil_div(p.Wo, cols),
                  units = ceil_div<int64_t>(p.N, images) * bands * strips;
    const int shares = shares_for(units, L.count, p.threads);
    const int64_t tasks = units * shares;
    const size_t bytes = this->room();
    Tasks queue(tasks, p.threads);
    in_parallel(least<int64_t>(p.threads, tasks), [&](int self) {
      const Place at = this->lay_out(static_cast<char*>(workspace(bytes)));
      int64_t packed_unit = -1;
      int held = -1;
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int64_t unit = task / shares, share = task % shares;
        const TileBlock b = this->block(unit, bands, strips);
        if (packed_unit != unit) {
          this->pack(b, at);
          held = -1;
        }
        packed_unit = unit;
        const int s0 = int(L.count * share / shares), s1 = int(L.count * (share + 1) / shares);
        const int64_t following = queue.expected(self), next = following / shares;
        Ahead ahead;
        if (following >= 0 && next != unit) {
          const TileBlock f = this->block(next, bands, strips);
          ahead = this->input_of(f.n, f.oy, f.ox, 1);
          ahead.spread(int64_t(s1 - s0) * kPositions * ceil_div(b.tiles, kMaxPixels));
        }
        compute(b, at, s0, s1, &held, ahead);
      }
      if (past_caches) non_temporal_fence();
    });
  }
};

// These return false where a band would not fit that is to be pooled, or tiles are not made of its
// windows; nothing was written then.
template <class S, class A>
static bool fprop_phases(const Lowered& L, OffsetCache* cache, const Problem& p,
                         const void* packed) {
  WinogradFprop<S, A, 3> form(L, p, static_cast<const A*>(packed));
  if (p.pool) return Pooled<S, A, WinogradFprop<S, A, 3>>(form).run(cache);
  form.run(cache);
  return true;
}

template <class S, class A, int M, class K = WinogradColumns<A>>
static bool fprop_tiles(const Lowered& L, OffsetCache* cache, const Problem& p,
                        const void* packed) {
  if (p.pool && !pools_tiles(p)) return false;
  WinogradFprop<S, A, M, K>(L, p, static_cast<const A*>(packed)).run(cache);
  return true;
}

template <class S, class A>
static bool fprop_winograd(const Lowered& L, OffsetCache* cache, const Problem& p,
                           const void* packed) {
  switch (L.winograd->tile) {
    case 2:
      return fprop_tiles<S, A, 2>(L, cache, p, packed);
    case 3:
      return fprop_phases<S, A>(L, cache, p, packed);
    default:
      return fprop_tiles<S, A, 4>(L, cache, p, packed);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
