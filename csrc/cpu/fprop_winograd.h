// SPDX-License-Identifier: Apache-2.0
// fprop by Winograd's F(MxM, 3x3) or F(3x3, 4x4) with filters in vectors (see winograd.h). Tasks
// are (images, band of rows, strip of columns, share of the segments); a band is packed as ever, or
// by phases, and what is not transformed is computed from it first.
#pragma once
#include <cmath>
#include "fprop_pooled.h"
#include "pack_phases.h"
#include "winograd_outputs.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr size_t kTransformedBytes = 384u << 10;  // of a band's inputs
constexpr int kEnoughTiles = 5 * kMaxPixels;      // for weights that come from far

template <class S, class A, int M> struct WinogradFprop : FiltersFprop<S, A> {
  using Base = FiltersFprop<S, A>;
  using Base::Cb;
  using Base::cols;
  using Base::in_pixel;
  using Base::in_row;
  using Base::L;
  using Base::off;
  using Base::p;
  using Base::packed;
  using Base::rows;
  using Base::xa;
  using Base::ya;
  static constexpr int kPositions = positions(M), kBeyond = taps(M) - 1, kPhases = phases(M);
  static constexpr int kTileRows = M;
  // Sums of a chunk: [position][tile][nv * VL], the same room for each number of tiles.
  template <int NV>
  static constexpr ptrdiff_t kSumsPitch = (ptrdiff_t(kMaxPixels) * NV | 1) * VL<A>;
  static constexpr size_t kSumsBytes = size_t(kSumsPitch<2>) * kPositions * sizeof(A);

  const Winograd& W;
  int images = 1;  // side by side in one band

  WinogradFprop(const Lowered& lowered, const Problem& problem, const A* weights)
      : Base{lowered, problem, weights}, W(*lowered.winograd) {}

  // Where tasks keep what they compute from.
  struct Place {
    A *band, *inputs, *sums, *scratch;
  };

  // What is brought near ahead of its use: a chunk's outputs of some vectors of filters.
  struct Outputs {
    TileChunk tiles;
    const int* filters;
    int vectors;
  };

  static int in_tiles(int n) { return ceil_div(n, M); }
  static int whole(int n) { return in_tiles(n) * M; }
  int tiles_of(int r, int c) const { return in_tiles(r) * in_tiles(c); }
  size_t inputs_bytes(int tiles) const {
    return size_t(position_pitch<A>(tiles, W.widest * VL<A>)) * kPositions * sizeof(A);
  }
  bool turns() const { return p.y.sc != 1 && p.y.sw == 1; }
  size_t outputs_bytes(int r, int c) const {
    const size_t pixels = size_t(ceil_div(images * r * c, VL<A>)) * VL<A>;
    return pixels * 2 * VL<A> * (turns() ? 2 : 1) * sizeof(A);
  }
  size_t image_bytes(int r, int c) const {
    return size_t(whole(r) + kBeyond) * size_t(whole(c) + kBeyond) * size_t(Cb) * sizeof(A);
  }
  bool fits(int m, int r, int c) const {
    const int tiles = m * tiles_of(r, c);
    return inputs_bytes(tiles) <= kTransformedBytes && m * image_bytes(r, c) <= kImageBlockBytes;
  }

  void choose_band() {
    Cb = ceil_div(W.channels, VL<A>) * VL<A>;
    if (int64_t(Cb) * sizeof(A) % 1024 == 0) Cb += VL<A>;
    const bool waits = p.pool && !pools_tiles(p);  // for `Pooled`, which lays its own rows
    rows = least(waits ? 2 * M : M, p.Ho);
    cols = p.Wo;
    while (cols > M && !fits(1, rows, cols)) cols = whole(ceil_div(cols, 2));
    while (rows < p.Ho && fits(1, rows + M, cols) &&
           (image_bytes(rows + M, cols) <= kBandBytes || tiles_of(rows, cols) < 2 * kMaxPixels))
      rows += M;
    if (!waits) balance();
    // Several small images, as long as every thread has some.
    if (rows == p.Ho && cols == p.Wo) {
      const int64_t most_images = p.N / most(1, p.threads);
      while (images < most_images && images * tiles_of(rows, cols) < kEnoughTiles &&
             fits(images + 1, rows, cols))
        ++images;
      images = int(ceil_div<int64_t>(p.N, ceil_div<int64_t>(p.N, images)));
    }
    lay();
  }
  // Lower bands where threads would otherwise wait for the last one. Each packs two rows twice; a
  // row of tiles of less than a chunk reads the weights too often.
  void balance() {
    const int64_t strips = ceil_div(p.Wo, cols), per_image = in_tiles(p.Ho),
                  all = p.N * strips * per_image;
    double best = 0;
    for (int64_t r = in_tiles(rows); r > 0; --r) {
      const int64_t units = p.N * strips * ceil_div(per_image, r),
                    shares = shares_for(units, L.count, p.threads);
      if (best > 0 && tiles_of(int(r) * M, cols) < kMaxPixels && units >= p.threads) break;
      // Rows of tiles of the thread that has most, in units of a share.
      const double share = double(r) / double(shares),
                   most_rows = std::ceil(double(all) / p.threads / share) * share,
                   time = most_rows * (1 + 0.2 / double(M * r));
      if (best > 0 && time > 0.97 * best) continue;
      best = time;
      rows = least(p.Ho, int(r) * M);
    }
  }
  void lay() {
    this->direct = false;
    if (kPhases == 1) return this->lay_axes(whole(rows), whole(cols));
    in_row = int64_t(whole(cols) + kBeyond) * Cb;
    in_pixel = Cb;
  }

  size_t room_for_image() const {
    return (image_bytes(rows, cols) + VL<A> * sizeof(A) + 63) / 64 * 64;
  }
  int most_tiles() const { return images * tiles_of(rows, cols); }
  size_t room() const {
    return images * room_for_image() + inputs_bytes(most_tiles()) + kSumsBytes +
           outputs_bytes(rows, cols) + 4 * HETCONV_VECTOR_BYTES;
  }
  Place lay_out(char* memory) const {
    Place at;
    at.band = reinterpret_cast<A*>(memory);
    at.inputs = reinterpret_cast<A*>(memory += images * room_for_image());
    at.sums = reinterpret_cast<A*>(memory += inputs_bytes(most_tiles()));
    at.scratch = reinterpret_cast<A*>(memory + kSumsBytes);
    return at;
  }
  const A* image(const Place& at, int m) const {
    return at.band + m * (room_for_image() / sizeof(A));
  }

  void pack(const TileBlock& b, const Place& at) const {
    for (int m = 0; m < b.images; ++m) {
      const S* x = reinterpret_cast<const S*>(p.x.data) + (b.n + m) * p.x.sn;
      A* band = const_cast<A*>(image(at, m));
      if (kPhases == 1)
        pack_channels_last<S, A>(p, x, ya, xa, b.oy, b.ox, M * b.tr, M * b.tc, Cb, band);
      else
        pack_phases<S, A>(p, x, b.oy, b.ox, M * b.tr + kBeyond, M * b.tc + kBeyond, Cb, in_row,
                          band);
    }
  }
  void transform(const WinogradUnit& u, const TileBlock& b, const Place& at) const {
    const int width = u.vectors * VL<A>;
    const ptrdiff_t pitch = position_pitch<A>(b.tiles, width);
    for (int m = 0; m < b.images; ++m)
      for (int r = 0; r < b.tr; ++r)
        for (int v = 0; v < u.vectors; ++v)
          transform_inputs<A, M>(
              image(at, m) + M * r * in_row + W.from[u.from0 + v], in_row, in_pixel, b.tc,
              at.inputs + (ptrdiff_t(m) * b.tr + r) * b.tc * width + v * VL<A>, width, pitch);
  }

  // What is not transformed, to scratch: [image][row][column][nv * VL].
  template <int NV>
  void compute_rest(const FilterSegment& s, const TileBlock& b, const Place& at) const {
    constexpr int FT = NV * VL<A>;
    const FilterSteps steps = FilterColumns<A>::steps(L, s, off);
    const int tiles = ceil_div(b.nc, kMaxPixels), base = b.nc / tiles, more = b.nc % tiles;
    const auto big = filters_kernel_for<A, NV>(least(base + 1, kMaxPixels)),
               small = filters_kernel_for<A, NV>(base);
    A* o = at.scratch;
    for (int m = 0; m < b.images; ++m)
      for (int r = 0; r < b.nr; ++r) {
        const A* a = image(at, m) + r * in_row;
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
    static const int none[2] = {0, 0};
    const int width = W.units[k.unit].vectors * VL<A>, pairs[2] = {k.pairs, 0},
              columns = 4 * k.quads + k.singles + k.pairs;
    const FilterSteps steps{W.offsets + k.off0,     k.quads, k.singles, 0,      0, 0,
                            NV == 1 ? pairs : none, none,    NV == 1,   nullptr};
    const ptrdiff_t from = position_pitch<A>(b.tiles, width);
    const auto kernel = products_kernel<NV>(c.tiles);
    const A *a = at.inputs + ptrdiff_t(c.first) * width, *w = packed + k.w0;
    TileAt<M> near(b, next.tiles.first);
    int fetched = 0;
    for (int q = 0; q < kPositions; ++q, a += from, w += ptrdiff_t(columns) * 2 * VL<A>) {
      Ahead::step<false>(ahead);
      for (; fetched < (q + 1) * next.tiles.tiles / kPositions; ++fetched, near.next(b))
        fetch_outputs(p, b, near, next);
      kernel(a, width, steps, w, at.sums + q * kSumsPitch<NV>, NV * VL<A>);
    }
  }
  // One vector of filters: two products a load.
  template <int MR>
  static void pairs_product(const A* a, ptrdiff_t ps, const FilterSteps& s, const A* w, A* o,
                            ptrdiff_t) {
    pairs_kernel<A, MR, 1>(a, ps, s, s.off, w, o);
  }
  template <int... mr>
  static FiltersKernel<A> pairs_product_for(int n, std::integer_sequence<int, mr...>) {
    static const FiltersKernel<A> kernels[] = {pairs_product<mr + 1>...};
    return kernels[n - 1];
  }
  template <int NV> static FiltersKernel<A> products_kernel(int n) {
    if constexpr (NV == 2) return filters_kernel_for<A, 2>(n);
    return pairs_product_for(n, std::make_integer_sequence<int, kMaxPixels>());
  }

  // Brings the outputs of a tile near, and what is added to them.
  HC_INLINE void fetch_outputs(const Problem& p, const TileBlock& b, const TileAt<M>& at,
                               const Outputs& next) {
    const ptrdiff_t y = at.place(b, p.y), res = at.place(b, p.res);
    for (int v = 0; v < next.vectors; ++v) HC_UNROLL for (int k = 0; k < M * M; ++k) {
        const S* to = reinterpret_cast<const S*>(p.y.data) + y + next.filters[v * VL<A>];
        const S* more = reinterpret_cast<const S*>(p.res.data) + res + next.filters[v * VL<A>];
        __builtin_prefetch(to + k / M * p.y.sh + k % M * p.y.sw, 1, 2);
        if (p.res.data) __builtin_prefetch(more + k / M * p.res.sh + k % M * p.res.sw, 0, 2);
      }
  }

  void put(const TileBlock& b, const TileChunk& c, const TileSums<A>& from, bool add,
           const Lanes<S, A>& lanes) const {
    if (p.pool) return pool(b, c, add ? from : without_rest(from), lanes);
    if (!lanes.simple()) return scratch_tiles<A, M>(b, c, from, add);
    const Simple<S, A> e(lanes);
    const int f0 = lanes.filters[0];
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
    return L.filters + L.segments[k.segment].filter0 + k.vector * VL<A>;
  }
  const WinogradPart* after(const WinogradPart* k) const {
    return k + 1 < W.parts + W.nparts ? k + 1 : nullptr;
  }
  // What a part adds to, or makes of, its segment's filters: chunk by chunk, so that sums are
  // transformed while they are in the first cache. following: whose outputs are made next, or null.
  template <int PV>
  void part(const WinogradPart& k, const FilterSegment& s, const Lanes<S, A>* lanes, bool rest,
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
    const FilterSegment& s = L.segments[number];
    const int* filters = L.filters + s.filter0;
    const WinogradPart *first = W.parts + W.part0[number], *last = W.parts + W.part0[number + 1];
    int covered = 0;
    for (const WinogradPart* k = first; k < last; ++k) covered += k->nv;
    const bool rest =
        covered < s.nv || s.quads + s.singles + s.split + s.straight + s.turned > 0 || s.paired();
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
  void emit(const FilterSegment& s, const TileBlock& b, const Place& at, const bool* done) const {
    constexpr int FT = NV * VL<A>;
    const int* filters = L.filters + s.filter0;
    const Out<A> out = out_of<A>(p);
    const int pixels = b.nr * b.nc;
    const bool turn = turns();
    for (int m = 0; m < b.images; ++m) {
      const int64_t n = b.n + m, y = n * p.y.sn + b.oy * p.y.sh + b.ox * p.y.sw,
                    res = n * p.res.sn + b.oy * p.res.sh + b.ox * p.res.sw;
      const A* from = at.scratch + ptrdiff_t(m) * pixels * FT;
      if (turn) {
        A* turned = at.scratch + outputs_bytes(rows, cols) / sizeof(A) / 2;
        const ptrdiff_t pitch = ceil_div(pixels, VL<A>) * VL<A>;
        transpose_scratch<A>(from, FT, pixels, s.lanes, turned, pitch);
        for (int f = 0; f < s.lanes; ++f)
          emit_rows<S, A>(out, filters[f], turned + f * pitch, b.nc, b.nr, b.nc, y, res);
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
      if (L.segments[s].nv == 2)
        segment<2>(s, b, at, held, ahead);
      else
        segment<1>(s, b, at, held, ahead);
  }
  TileBlock block_of(int64_t n, int m, int oy, int ox, int nr, int nc) const {
    const int tr = in_tiles(nr), tc = in_tiles(nc);
    return {n, m, oy, ox, nr, nc, tr, tc, m * tr * tc};
  }
  TileBlock block(int64_t unit, int64_t bands, int64_t strips) const {
    const int64_t n = unit / (bands * strips) * images;
    const int oy = int(unit / strips % bands) * rows, ox = int(unit % strips) * cols;
    return block_of(n, int(least<int64_t>(images, p.N - n)), oy, ox, least(rows, p.Ho - oy),
                    least(cols, p.Wo - ox));
  }

  void find_offsets(OffsetCache* cache) {
    if (kPhases == 1) Base::find_offsets(cache);  // else all is transformed
  }

  // What `Pooled` needs: of rows, strip after strip.
  bool has_bands() const { return p.y.sc == 1; }
  void lay_rows(int r) {
    rows = r;
    images = 1;
    lay();
  }
  size_t room_for_band() const { return room_for_image() + inputs_bytes(most_tiles()); }
  size_t room_for_scratch() const { return room() - room_for_band(); }
  void compute_rows(int64_t n, int oy, int nr, A* band, A* scratch, Ahead& ahead) const {
    Place at = lay_out(reinterpret_cast<char*>(band));
    at.sums = scratch;
    at.scratch = scratch + kSumsBytes / sizeof(A);
    for (int ox = 0; ox < p.Wo; ox += cols) {
      const TileBlock b = block_of(n, 1, oy, ox, nr, least(cols, p.Wo - ox));
      pack(b, at);
      int held = -1;
      compute(b, at, 0, L.count, &held, ahead);
    }
  }

  void run(OffsetCache* cache) {
    choose_band();
    find_offsets(cache);
    const int64_t bands = ceil_div(p.Ho, rows), strips = ceil_div(p.Wo, cols),
                  units = ceil_div<int64_t>(p.N, images) * bands * strips;
    const int shares = shares_for(units, L.count, p.threads);
    const int64_t tasks = units * shares;
    const size_t bytes = room();
    Tasks queue(tasks, p.threads);
    in_parallel(least<int64_t>(p.threads, tasks), [&](int self) {
      const Place at = lay_out(static_cast<char*>(workspace(bytes)));
      int64_t packed_unit = -1;
      int held = -1;
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int64_t unit = task / shares, share = task % shares;
        const TileBlock b = block(unit, bands, strips);
        if (packed_unit != unit) {
          pack(b, at);
          held = -1;
        }
        packed_unit = unit;
        const int s0 = int(L.count * share / shares), s1 = int(L.count * (share + 1) / shares);
        const int64_t following = queue.expected(self), next = following / shares;
        Ahead ahead;
        if (following >= 0 && next != unit) {
          const TileBlock f = block(next, bands, strips);
          ahead = this->input_of(f.n, f.oy, f.ox, 1);
          ahead.spread(int64_t(s1 - s0) * kPositions * ceil_div(b.tiles, kMaxPixels));
        }
        compute(b, at, s0, s1, &held, ahead);
      }
    });
  }
};

// False: tiles are not made of what is to be pooled, or a band would not fit; nothing was written.
template <class S, class A>
static bool fprop_winograd(const Lowered& L, OffsetCache* cache, const Problem& p,
                           const void* packed) {
  const A* weights = static_cast<const A*>(packed);
  if (L.winograd->tile == 3) {
    WinogradFprop<S, A, 3> form(L, p, weights);
    if (p.pool) return Pooled<S, A, WinogradFprop<S, A, 3>>(form).run(cache);
    form.run(cache);
    return true;
  }
  if (p.pool && !pools_tiles(p)) return false;
  if (L.winograd->tile == 2)
    WinogradFprop<S, A, 2>(L, p, weights).run(cache);
  else
    WinogradFprop<S, A, 4>(L, p, weights).run(cache);
  return true;
}

}  // namespace HETCONV_NS
}  // namespace hetconv
