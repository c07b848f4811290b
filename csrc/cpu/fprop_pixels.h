// SPDX-License-Identifier: Apache-2.0
// fprop with pixels in vectors: tasks are (block of images, band of rows, strip of columns, share
// of the filter tiles).
#pragma once
#include "ahead.h"
#include "fprop_filters.h"
#include "micro_pixels.h"
#include "pixel_bands.h"

namespace hetconv {
namespace HETCONV_NS {

template <class A>
static const int* pixel_offsets(const Lowered& L, OffsetCache* cache, const Axis& ya,
                                const Axis& xa, const Planar& g, bool direct) {
  OffsetKey key;
  memset(&key, 0, sizeof key);
  int* rows = key.v + 4;
  int* columns = key.v + 4 + kMaxKernel;
  key.v[0] = direct ? 1 : 2;
  key.v[1] = int(g.plane);
  if (!direct) {
    for (int k = 0; k < L.KH; ++k) rows[k] = int(ya.start[k] * g.row);
    for (int k = 0; k < L.KW; ++k)
      columns[k] = int(xa.piece_of[k] * g.piece + xa.start[k] - xa.piece[xa.piece_of[k]].e0);
  }
  if (const int* found = offsets_find(cache, key)) return found;
  int* off = static_cast<int*>(malloc(sizeof(int) * size_t(L.ncolumns + 1)));
  if (!off) return nullptr;
  for (int64_t i = 0; i < L.ncolumns; ++i) {
    const Column& c = L.columns[i];
    const int64_t channel = direct ? c.channel : L.plane[c.channel];
    off[i] = int(channel * g.plane + rows[c.ky] + columns[c.kx]);
  }
  return offsets_keep(cache, key, off, sizeof(int) * size_t(L.ncolumns + 1));
}

template <class S, class A> struct PixelsFprop : PixelBands<S, A> {
  using Base = PixelBands<S, A>;
  using Band = A;
  using Base::at_once, Base::cols, Base::direct, Base::g, Base::gather, Base::halves, Base::images,
      Base::L, Base::length_of, Base::p, Base::rows, Base::swept, Base::transposed, Base::wide_for,
      Base::xa, Base::ya;
  const A* packed;
  const int* off = nullptr;
  bool taps_are_neighbours = false;  // tap k reads tap_shift[k] entries after tap 0, in one piece
  int tap_shift[kMaxKernel] = {};

  PixelsFprop(const Lowered& lowered, const Problem& problem, const A* weights)
      : Base(lowered, problem), packed(weights) {}

  // All pixels [0, length) of one tile of filters, to rows of `wide` elements. A tile of few
  // filters would wait for its loads: where it has whole kernel rows and neighbouring taps read
  // neighbouring pixels, each tap counts as a filter of its own (the weights lie that way already)
  // and the partial sums are added up at the end, each moved by its tap.
  void tile(const PixelTile& t, const A* a, int length, A* o, ptrdiff_t wide, const int* to,
            A* spare, Ahead& ahead, Ahead& added, Ahead& written) {
    if (!t.whole_rows || !taps_are_neighbours) {
      sweep(t.nf, t.ncols, 1, t, a, length, o, wide, to, ahead, added, written, nullptr);
      return;
    }
    const int reach = tap_shift[L.KW - 1];
    sweep(t.nf * L.KW, t.ncols / L.KW, L.KW, t, a, length + reach, spare, wide, L.identity, ahead,
          added, written, nullptr);
    for (int i = 0; i < t.nf; ++i)
      for (int at = 0; at < length; at += VL<A>) {
        Vec<A> sum = load<A>(spare + i * wide + at);
        for (int k = 1; k < L.KW; ++k)
          sum += load<A>(spare + (k * t.nf + i) * wide + at + tap_shift[k]);
        store<A>(o + to[i] * wide + at, sum);
      }
  }
  // end: of sums that go to the output at once; its residual is that of the first pixel.
  void sweep(int nf, int ncols, int step, const PixelTile& t, const A* a, int length, A* o,
             ptrdiff_t wide, const int* to, Ahead& ahead, Ahead& added, Ahead& written,
             const PlanesEnd<A>* end) {
    const bool exact = direct || end;  // never read or write beyond the tensor
    const int limit = exact ? least(kPixelVectors[nf], length / VL<A>) : kPixelVectors[nf];
    const int nvec = pixel_vectors<A>(length), over = pixels_over<A>(length),
              tiles = ceil_div(nvec, limit), base = nvec / tiles, more = nvec % tiles;
    const PixelsKernel<A> small = pixels_kernel_for<A>(nf, base, 0),
                          big = more ? pixels_kernel_for<A>(nf, base + 1, 0) : small,
                          last = over ? pixels_kernel_for<A>(nf, base, over) : small;
    for (int k = 0, v = 0; k < tiles; ++k) {
      const int np = base + (k < more);
      int at = v * VL<A>;
      if (exact) at = least(at, length - np * VL<A>);
      PlanesEnd<A> own{};
      if (end) own = *end;
      if (own.res) own.res += at;
      Ahead::step<false>(ahead);
      Ahead::step<false>(added);
      Ahead::step<true>(written);
      const PixelsKernel<A> kernel = k < more ? big : k < tiles - 1 ? small : last;
      kernel(a + at, off + t.col0, step, ncols, packed + t.w0, o + at, wide, to, L.accumulate != 0,
             end ? &own : nullptr);
      v += np;
    }
  }

  void emit_filters(const PixelTile& t, const A* acc, ptrdiff_t wide, int64_t n0, int nm, int oy,
                    int ox, int nr, int nc) {
    const Out<A> out = out_of<A>(p);
    for (int i = 0; i < t.nf; ++i)
      for (int m = 0; m < nm; ++m)
        emit_rows<S, A>(out, L.filters[t.filter0 + i], acc + i * wide + int64_t(m) * g.pitch,
                        int64_t(images) * g.pitch, nr, nc,
                        (n0 + m) * p.y.sn + int64_t(oy) * p.y.sh + int64_t(ox) * p.y.sw,
                        (n0 + m) * p.res.sn + int64_t(oy) * p.res.sh + int64_t(ox) * p.res.sw);
  }

  // Whether sums go to planes of the output as they are computed: there and in the band the pixels
  // follow one another, a vector at least.
  bool finishes(int nr, int nc) const {
    const bool one_run =
        images == 1 &&
        (nr == 1 || (g.pitch == nc && p.y.sh == nc && (!p.res.data || p.res.sh == nc)));
    return sizeof(S) == sizeof(A) && p.y.sw == 1 && !gather && one_run &&
           length_of(nr, nc) >= VL<A> && !p.scale && (p.act == Act::none || p.act == Act::relu) &&
           (!p.res.data || p.res.sw == 1);
  }
  // The pixels from (oy, ox) of image n.
  void finish_tile(const PixelTile& t, const A* a, int length, int64_t n, int oy, int ox,
                   Ahead& ahead) {
    PlanesEnd<A> end{static_cast<const A*>(p.shift), nullptr, p.res.sc, p.act == Act::relu};
    if (p.res.data) end.res = reinterpret_cast<const A*>(p.res.data) + pixel_of(p.res, n, oy, ox);
    Ahead none;  // the kernel fetches its own
    sweep(t.nf, t.ncols, 1, t, a, length, reinterpret_cast<A*>(output_at(n, oy, ox)), p.y.sc,
          L.filters + t.filter0, ahead, none, none, &end);
  }

  // A band for tiles [t0, t1), a few rows at a time with all filters.
  void gathered_band(const A* a, A* scratch, int t0, int t1, int64_t n0, int nm, int oy, int ox,
                     int nr, int nc, Ahead& ahead) {
    const Out<A> out = out_of<A>(p);
    const bool whole = t0 == 0 && t1 == L.count;
    const int f0 = L.accumulate ? 0 : L.tiles[t0].filter0;
    const int nf = L.accumulate ? L.F : L.tiles[t1 - 1].filter0 + L.tiles[t1 - 1].nf - f0;
    const int units = nr * images;
    for (int u0 = 0; u0 < units; u0 += at_once) {
      const int nu = least(at_once, units - u0);
      const ptrdiff_t wide = wide_for(length_of(nu, nc));
      A* spare = scratch + nf * wide;
      if (L.accumulate) zero_fill(scratch, int64_t(nf) * wide);
      // What the rows' results are added to, and where they go.
      const int64_t calls = calls_for(t1 - t0, length_of(nu, nc));
      Ahead added, written;
      if (transposed && images == 1) {
        const int part = halves ? 2 : 1;
        written = rows_of(p.y, n0, (oy + u0) / part, ox / part, nu / part, nc / part, calls);
        if (p.res.data && p.res.sc == 1) added = rows_of(p.res, n0, oy + u0, ox, nu, nc, calls);
      }
      for (int t = t0; t < t1; ++t) {
        const PixelTile& k = L.tiles[t];
        const bool add = L.accumulate != 0;
        A* o = add ? scratch : scratch + int64_t(k.filter0 - f0) * wide;
        const int* to = add ? L.filters + k.filter0 : L.identity;
        for (int u = 0; u < nu; u += swept)
          tile(k, a + int64_t(u0 + u) * g.pitch, length_of(least(swept, nu - u), nc),
               o + int64_t(u) * g.pitch, wide, to, spare, ahead, added, written);
      }
      const int* filters = whole ? L.identity : L.filters + f0;
      const int* order = whole && !L.accumulate ? L.ascending : nullptr;
      for (int u = 0; halves && u < nu; u += 2) {
        A* row = scratch + int64_t(u) * g.pitch;
        for (int l = 0; l < nf; ++l) pool_in_place<A>(row + l * wide, g.pitch, nc / 2);
        emit_transposed<S, A>(out, filters, nf, whole, order, row, wide, nc / 2,
                              pixel_of(p.y, n0, (oy + u0 + u) / 2, ox / 2), 0);
      }
      for (int u = 0; !halves && u < nu;) {
        // Rows of one image follow one another; with several images side by side each row is its
        // own run.
        const int r = (u0 + u) / images, m = (u0 + u) % images,
                  run = images == 1 && !transposed ? nu - u : 1;
        const int64_t at = pixel_of(p.y, n0 + m, oy + r, ox),
                      res_at = pixel_of(p.res, n0 + m, oy + r, ox);
        if (m < nm && transposed)
          emit_transposed<S, A>(out, filters, nf, whole, order, scratch + int64_t(u) * g.pitch,
                                wide, nc, at, res_at);
        else if (m < nm)
          for (int f = 0; f < nf; ++f)
            emit_rows<S, A>(out, f, scratch + f * wide + int64_t(u) * g.pitch, g.pitch, run, nc, at,
                            res_at);
        u += run;
      }
    }
  }
  static int64_t pixel_of(const View& v, int64_t n, int y, int x) {
    return n * v.sn + y * v.sh + x * v.sw;
  }
  // Rows of pixels of an output or residual with filters innermost, for so many calls to fetch.
  static Ahead rows_of(const View& v, int64_t n, int y, int x, int nr, int nc, int64_t calls) {
    Ahead a;
    a.base = v.data + pixel_of(v, n, y, x) * int64_t(sizeof(S));
    a.pitch = v.sh * int64_t(sizeof(S));
    a.span = nc * v.sw * int64_t(sizeof(S));
    a.rows = nr;
    a.spread(calls);
    return a;
  }
  char* output_at(int64_t n, int oy, int ox) const {
    return p.y.data + pixel_of(p.y, n, oy, ox) * int64_t(sizeof(S));
  }
  // Micro-kernel calls of a share of the tiles, roughly.
  int64_t calls_for(int tiles, int length) const {
    return int64_t(tiles) * ceil_div(length, 4 * VL<A>);
  }

  // The input of a unit, if it is channel-planar in memory.
  Ahead ahead_of(int64_t unit, int64_t nb, int64_t strips, int shares) const {
    Ahead a;
    if (p.x.sw != 1 || L.nlive == 0) return a;
    const int64_t n0 = unit / (nb * strips) * images;
    const int oy = int(unit / strips % nb) * rows, ox = int(unit % strips) * cols;
    const Rectangle r = input_pixels(p, oy, ox, rows, cols);
    if (r.empty()) return a;
    a.base = p.x.data + (n0 * p.x.sn + r.y0 * p.x.sh + r.x0) * int64_t(sizeof(S));
    a.which = L.live;
    a.pitch = p.x.sc * int64_t(sizeof(S));
    a.span = ((r.y1 - r.y0 - 1) * p.x.sh + (r.x1 - r.x0)) * int64_t(sizeof(S));
    a.rows = L.nlive;
    if (size_t(a.span) * size_t(a.rows) > kPlanarBandBytes) return Ahead{};  // where strides skip
    a.spread(calls_for(L.count / shares, rows * images * g.pitch));
    return a;
  }

  void find_offsets(OffsetCache* cache) {
    off = pixel_offsets<A>(L, cache, ya, xa, g, direct);
    taps_are_neighbours = !direct && xa.pieces == 1 && xa.step == 1;
    for (int k = 0; k < L.KW && taps_are_neighbours; ++k) {
      tap_shift[k] = xa.start[k] - xa.start[0];
      taps_are_neighbours =
          tap_shift[k] >= 0 && tap_shift[k] + VL<A> <= this->spare_vectors() * VL<A>;
    }
  }
  size_t room_for_band() const {
    const size_t slack = size_t(kMostPixelVectors + 1) * VL<A> * sizeof(A) + 64;
    return direct ? 0 : (this->band_bytes() + slack + 63) / 64 * 64;
  }
  size_t room_for_scratch() const {
    return this->scratch_elements(length_of(at_once, cols)) * sizeof(A) + 64;
  }

  // What `Pooled` needs: bands of whole rows of one image, of as many rows as it wants.
  static constexpr int kTileRows = 1;
  bool has_bands() const { return !direct && cols == p.Wo && images == 1 && transposed; }
  void lay_rows(int r) {
    this->lay(r, cols, 1, false);
    this->choose_rows_at_once();
  }
  void compute_rows(int64_t n, int oy, int nr, A* band, A* scratch, Ahead& ahead) {
    pack_planar<S, A>(p, reinterpret_cast<const S*>(p.x.data), Channels{L.live, L.nlive}, ya, xa, g,
                      n, 1, oy, 0, nr, cols, band);
    gathered_band(band, scratch, 0, L.count, n, 1, oy, 0, nr, cols, ahead);
  }
  Ahead input_of_rows(int64_t, int) const { return Ahead{}; }

  void run(OffsetCache* cache) {
    this->choose_band();
    run_bands(cache);
  }
  // After the choice of a band.
  void run_bands(OffsetCache* cache) {
    find_offsets(cache);
    const int64_t nb = ceil_div(p.Ho, rows), strips = ceil_div(p.Wo, cols), units = this->units();
    const int shares = this->shares_tiles() ? shares_for(units, L.count, p.threads) : 1;
    const int64_t tasks = units * shares;
    const size_t band_room = room_for_band(), scratch_room = room_for_scratch();
    Tasks queue(tasks, p.threads);
    in_parallel(least<int64_t>(p.threads, tasks), [&](int self) {
      char* room = static_cast<char*>(workspace(band_room + scratch_room));
      A* band = reinterpret_cast<A*>(room);
      A* scratch = reinterpret_cast<A*>(room + band_room);
      int64_t held = -1;
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int64_t unit = task / shares, share = task % shares,
                      n0 = unit / (nb * strips) * images;
        const int oy = int(unit / strips % nb) * rows, ox = int(unit % strips) * cols;
        const int nr = least(rows, p.Ho - oy), nc = least(cols, p.Wo - ox),
                  nm = int(least<int64_t>(images, p.N - n0));
        const S* x = reinterpret_cast<const S*>(p.x.data);
        const A* a = band;
        if (direct)
          a = reinterpret_cast<const A*>(x + n0 * p.x.sn + ox);
        else if (held != unit)
          pack_planar<S, A>(p, x, Channels{L.live, L.nlive}, ya, xa, g, n0, nm, oy, ox, nr, nc,
                            band);
        held = unit;
        const int64_t following = queue.expected(self);
        Ahead ahead = following >= 0 && following / shares != unit
                          ? ahead_of(following / shares, nb, strips, shares)
                          : Ahead{};
        const int t0 = int(L.count * share / shares), t1 = int(L.count * (share + 1) / shares);
        if (gather) {
          if (t1 > t0 || L.accumulate)
            gathered_band(a, scratch, t0, t1, n0, nm, oy, ox, nr, nc, ahead);
          continue;
        }
        const int n = length_of(nr * images, nc);
        const ptrdiff_t wide = wide_for(n);
        for (int t = t0; t < t1; ++t) {
          if (finishes(nr, nc) && !L.tiles[t].whole_rows) {
            finish_tile(L.tiles[t], a, n, n0, oy, ox, ahead);
            continue;
          }
          Ahead added, written;
          if (p.y.sw == 1 && images == 1) {
            written.base = output_at(n0, oy, ox);
            written.which = L.filters + L.tiles[t].filter0;
            written.pitch = p.y.sc * int64_t(sizeof(S));
            written.span = ((nr - 1) * p.y.sh + nc) * int64_t(sizeof(S));
            written.rows = L.tiles[t].nf;
            written.spread(calls_for(1, n));
          }
          tile(L.tiles[t], a, n, scratch, wide, L.identity, scratch + kMaxPixelFilters * wide,
               ahead, added, written);
          emit_filters(L.tiles[t], scratch, wide, n0, nm, oy, ox, nr, nc);
        }
      }
    });
  }
};

template <class S, class A>
static PixelsFprop<S, A> pixels_fprop(const Lowered& L, const Problem& p, const void* packed) {
  return {L, p, static_cast<const A*>(packed)};
}

template <class S, class A>
static void fprop_pixels(const Lowered& L, OffsetCache* cache, const Problem& p,
                         const void* packed) {
  pixels_fprop<S, A>(L, flatten_pointwise(L, p), packed).run(cache);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
