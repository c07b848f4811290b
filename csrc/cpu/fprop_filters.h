// SPDX-License-Identifier: Apache-2.0
// fprop with filters in vectors: tasks are (image, band of rows, strip of columns, share of the
// segments).
#pragma once
#include <type_traits>
#include "ahead.h"
#include "emit.h"
#include "micro_filters.h"
#include "pack.h"
#include "tasks.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kTasksPerThread = 32;

// A 1x1 layer over a dense pixel space is one long row of pixels.
static inline bool rows_are_flat(const View& v, int W) {
  return !v.data || v.sh == int64_t(W) * v.sw;
}
static inline bool images_are_flat(const View& v, int64_t pixels) {
  return !v.data || v.sn == pixels * v.sw;
}

static inline Problem flatten_pointwise(const Lowered& L, const Problem& p) {
  Problem q = p;
  const bool pointwise = L.KH == 1 && L.KW == 1 && p.sh == 1 && p.sw == 1 && p.pt == 0 &&
                         p.pl == 0 && p.H == p.Ho && p.W == p.Wo;
  if (!pointwise || int64_t(p.H) * p.W > (1 << 30)) return q;
  if (!rows_are_flat(p.x, p.W) || !rows_are_flat(p.y, p.W) || !rows_are_flat(p.res, p.W)) return q;
  q.W = q.Wo = p.H * p.W;
  q.H = q.Ho = 1;
  const int64_t pixels = q.W;
  if (pixels * p.N > (1 << 30)) return q;
  if (!images_are_flat(p.x, pixels) || !images_are_flat(p.y, pixels) ||
      !images_are_flat(p.res, pixels))
    return q;
  q.W = q.Wo = int(pixels * p.N);
  q.N = 1;
  return q;
}

// Shares of the segments, so that the last task to end does not keep the other threads waiting
// long. A thread that takes several shares of a band packs it once.
static inline int shares_for(int64_t units, int count, int threads) {
  if (threads <= 1) return 1;
  const int64_t wanted = kTasksPerThread * int64_t(threads);
  return int(least<int64_t>(count, ceil_div(wanted, most<int64_t>(units, 1))));
}

template <class A>
static const int* filter_offsets(const Lowered& L, OffsetCache* cache, const Axis& ya,
                                 const Axis& xa, int64_t row, int64_t pixel) {
  OffsetKey key;
  memset(&key, 0, sizeof key);
  key.v[0] = int(row);
  key.v[1] = int(pixel);
  for (int k = 0; k < L.KH; ++k) key.v[4 + k] = ya.start[k];
  for (int k = 0; k < L.KW; ++k) key.v[4 + kMaxKernel + k] = xa.start[k];
  if (const int* found = offsets_find(cache, key)) return found;
  int* off = static_cast<int*>(malloc(sizeof(int) * size_t(L.ncolumns + 1)));
  if (!off) return nullptr;
  for (int64_t i = 0; i < L.ncolumns; ++i) {
    const Column& c = L.columns[i];
    off[i] = int(ya.start[c.ky] * row + xa.start[c.kx] * pixel + c.channel);
  }
  return offsets_keep(cache, key, off, sizeof(int) * size_t(L.ncolumns + 1));
}

// What FiltersFprop multiplies: here columns of a band of the accumulation type.
template <class A> struct FilterColumns {
  using Band = A;
  using Segment = FilterSegment;
  static const Segment* segments(const Lowered& L) { return L.segments; }
  // Lanes that read channels of their own want whole vectors of them.
  static bool reads_vectors(const Segment& s) { return s.straight + s.permuted > 0; }
  static bool copies(const Segment&) { return false; }
  static int copy_of(const Segment&) { return -1; }
  static void copy(const Lowered&, const Segment&, const Band*, int64_t, int, Band*) {}
  // Whether pixels lie C elements apart, so that columns go on into the next one. Where the taps of
  // an output are no neighbours, it reads a copy of them that are.
  static bool spans(const Lowered&) { return false; }
  template <class S>
  static void patches(const Problem&, const S*, int, const Axis&, int, int, int, int, int64_t,
                      Band*) {}
  // Whether it may read pixels of C channels where they lie.
  static bool in_place(int C, bool /*vectors*/) { return C % VL<A> == 0; }
  // in_pixel: distance of neighbouring output pixels in the band; 0 where it is not known.
  static FilterSteps<A> steps(const Lowered& L, const Segment& s, const int* off,
                              ptrdiff_t in_pixel = 0) {
    FilterSteps<A> steps = {
        off + s.col0,    s.quads,
        s.singles,       s.split,
        s.straight,      s.permuted,
        s.pairs,         s.halves,
        s.paired() != 0, L.perms ? reinterpret_cast<const A*>(L.perms) + s.perm0 : nullptr};
    const int* permuted = steps.off + s.quads + s.singles + (s.split + s.straight) * s.nv;
    for (int j = 0; j < s.nv; ++j) permuted += s.pairs[j] + 2 * s.halves[j];
    if (neighbours(s.triples, s.twins, permuted, s.nv, in_pixel)) {
      steps.triples = s.triples;
      steps.twins = s.twins;
      steps.alike = s.alike != 0;
    }
    return steps;
  }
  // Of a tile.
  template <int NV> static int most_pixels(const FilterSteps<A>& s) {
    return s.triples + s.twins ? kMaxRowPixels[NV] : kMaxPixels;
  }
  template <int NV> static FiltersKernel<A> kernel(int mr) { return filters_kernel_for<A, NV>(mr); }
};

template <class S, class A, class K = FilterColumns<A>> struct FiltersFprop {
  using Band = typename K::Band;
  using Segment = typename K::Segment;
  const Lowered& L;
  Problem p;
  const A* packed;
  const int* off = nullptr;
  Axis ya{}, xa{};
  int Cb = 0, rows = 0, cols = 0;       // of a band
  bool direct = false, copies = false;  // reads the input in place; segments read copies of a band
  bool patches = false;                 // of the taps of each output
  bool past_caches = false;             // outputs are written by non-temporal stores
  int64_t in_row = 0, in_pixel = 0;     // input distance of neighbouring output rows and pixels

  // Picks the band so that it fits its share of the cache.
  void choose_band() {
    // Few channels lie as close as in memory, but for what a column reads at once.
    bool vectors = false;
    for (int s = 0; s < L.count; ++s) {
      vectors |= K::reads_vectors(K::segments(L)[s]);
      copies |= K::copies(K::segments(L)[s]);
    }
    const int unit = vectors ? VL<Band> : p.C >= VL<A> ? VL<A> : int(sizeof(A) / sizeof(Band));
    Cb = ceil_div(p.C, unit) * unit;
    if (int64_t(Cb) * sizeof(Band) % 1024 == 0)
      Cb += 64 / int(sizeof(Band));  // neighbouring pixels in different cache sets
    if (K::spans(L)) Cb = p.C;
    direct = sizeof(S) == sizeof(Band) && p.x.sc == 1 && L.KH == 1 && L.KW == 1 && p.pt <= 0 &&
             p.pl <= 0 && !copies && K::in_place(p.C, vectors) && (p.Ho - 1) * p.sh - p.pt < p.H &&
             (p.Wo - 1) * p.sw - p.pl < p.W;
    cols = p.Wo;
    if (direct) {
      axis_shared(&ya, 1, 1, 1, 1);
      axis_shared(&xa, 1, 1, 1, 1);
      in_row = p.sh * p.x.sh;
      in_pixel = p.sw * p.x.sw;
      const int64_t pixels = most<int64_t>(kMaxPixels, int64_t(kBandBytes / sizeof(Band)) / p.C);
      cols = int(least<int64_t>(p.Wo, pixels));
      rows = int(most<int64_t>(1, least<int64_t>(p.Ho, pixels / cols)));
    } else {
      rows = 1;
      while (cols > 1 && (copies ? 2 : 1) * band_bytes(1, cols) + scratch_bytes(cols) >
                             kWorkspaceBytes * (cols > kMaxPixels ? 3 : 4) / 4 - 1024)
        cols = ceil_div(cols, 2);
      if (cols == p.Wo) choose_rows();
    }
    // Enough bands for every thread, and of equal height.
    const int64_t strips = ceil_div(p.Wo, cols);
    int64_t bands = ceil_div(p.Ho, rows);
    if (p.Ho == 1 && p.N * strips < 2 * p.threads && direct && p.Wo > 4 * kMaxPixels * p.threads)
      cols = ceil_div(ceil_div(p.Wo, 2 * p.threads), kMaxPixels) * kMaxPixels;
    if (p.N * strips * bands < p.threads) bands = least<int64_t>(p.Ho, bands * 2);
    rows = int(ceil_div<int64_t>(p.Ho, bands));
    if (!direct) lay_axes(rows, cols);
  }
  // As many rows as fit, in strips that are narrow enough for the least packing: rows that bands
  // share are packed twice. Whole rows are what pooling needs, and what planes want.
  void choose_rows() {
    double least_packed = 0;
    const bool strips = p.x.sc == 1 && p.y.sc == 1 && !p.pool;
    for (int s = 1; s == 1 || (strips && p.Wo / s >= 64); ++s) {
      const int c = ceil_div(p.Wo, s);
      int r = 1;
      while (r < p.Ho && band_bytes(r + 1, c) <= kBandBytes) ++r;
      const double packed = double(band_bytes(r, c)) / (double(r) * c);
      if (s > 1 && packed > 0.9 * least_packed) continue;
      least_packed = packed;
      rows = r;
      cols = c;
    }
  }
  void lay_axes(int r, int c) {
    axis_shared(&ya, L.KH, p.sh, p.dh, r);
    axis_shared(&xa, L.KW, p.sw, p.dw, c);
    if (ya.entries > L.KH * r) axis_copies(&ya, L.KH, p.sh, p.dh, r);
    patches = K::spans(L) && (xa.entries > L.KW * c || p.dw != 1);
    if (patches)  // an entry for each tap of each output
      axis_shared(&xa, 1, L.KW, 1, c), xa.entries = L.KW * c;
    else if (xa.entries > L.KW * c)
      axis_copies(&xa, L.KW, p.sw, p.dw, c);
    in_row = int64_t(ya.step) * xa.entries * Cb;
    in_pixel = int64_t(xa.step) * Cb;
  }
  void pack(const S* x, int oy, int ox, int nr, int nc, Band* band) const {
    if (patches)
      K::patches(p, x, L.KW, ya, oy, ox, nr, nc, int64_t(xa.entries) * Cb, band);
    else
      pack_channels_last<S, Band>(p, x, ya, xa, oy, ox, nr, nc, Cb, band);
  }
  size_t band_bytes(int r, int c) {
    const int64_t h =
        least<int64_t>((r - 1) * int64_t(p.sh) + (L.KH - 1) * int64_t(p.dh) + 1, int64_t(L.KH) * r);
    const int64_t w =
        least<int64_t>((c - 1) * int64_t(p.sw) + (L.KW - 1) * int64_t(p.dw) + 1, int64_t(L.KW) * c);
    if (K::spans(L)) return size_t(h * L.KW * c * Cb) * sizeof(Band);  // patches, at most
    return size_t(h * w * Cb) * sizeof(Band);
  }
  // Long runs where the output has pixels innermost: each filter's plane is far from the next.
  int emit_rows_at_once(int c) const {
    return most(1, (p.y.sc == 1 || p.y.sw != 1 ? 64 : 512) / c);
  }
  int scratch_pixels(int c) const { return ceil_div(emit_rows_at_once(c) * c, VL<A>) * VL<A>; }

  size_t scratch_bytes(int c) const {
    return size_t(scratch_pixels(c)) * 2 * VL<A> * 2 * sizeof(A) + 4 * HETCONV_VECTOR_BYTES;
  }

  // The input of a band, if its pixels are whole in memory, for so many segments to fetch.
  Ahead input_of(int64_t n, int oy, int ox, int segments) const {
    Ahead a;
    if (p.x.sc != 1) return a;
    const Rectangle r = input_pixels(p, oy, ox, rows, cols);
    if (r.empty()) return a;
    a.base = p.x.data + (n * p.x.sn + r.y0 * p.x.sh + r.x0 * p.x.sw) * int64_t(sizeof(S));
    a.pitch = p.x.sh * int64_t(sizeof(S));
    a.span = ((r.x1 - r.x0 - 1) * p.x.sw + p.C) * int64_t(sizeof(S));
    a.rows = r.y1 - r.y0;
    a.spread(int64_t(segments) * rows * ceil_div(cols, kMaxPixels));
    return a;
  }

  template <int NV>
  void segment(const Segment& s, const Band* band, A* scratch, int64_t n, int oy, int ox, int nr,
               int nc, Ahead& ahead, int& copied) {
    if (copies && K::copies(s)) {
      Band* copy = reinterpret_cast<Band*>(reinterpret_cast<char*>(scratch) + scratch_bytes(cols));
      if (copied != K::copy_of(s)) K::copy(L, s, band, int64_t(ya.entries) * xa.entries, Cb, copy);
      copied = K::copy_of(s);
      band = copy;
    }
    constexpr int FT = NV * VL<A>;
    auto steps = K::steps(L, s, off, in_pixel);
    const A* w = packed + s.w0;
    const int* filters = L.filters + s.filter0;
    const Out<A> out = out_of<A>(p);
    const bool near = s.contiguous && p.y.sc == 1 && (!p.res.data || p.res.sc == 1);
    // Whether the kernel itself writes whole vectors of filters, with this epilogue.
    bool finished = false;
    if constexpr (std::is_same_v<decltype(steps.end.y), S*>)
      finished = near && s.lanes == FT && steps.end.takes(out, filters[0]);
    const bool past = finished && past_caches && filters[0] % VL<A> == 0;
    steps.end.past_caches = past;
    const int pixels = K::template most_pixels<NV>(steps);
    const int tiles = ceil_div(nc, pixels), base = nc / tiles, more = nc % tiles;
    const auto big = K::template kernel<NV>(more ? base + 1 : base),
               small = K::template kernel<NV>(base);
    const int group = emit_rows_at_once(nc);
    for (int r0 = 0; r0 < nr; r0 += group) {
      const int gr = least(group, nr - r0);
      const int64_t at = n * p.y.sn + int64_t(oy + r0) * p.y.sh + int64_t(ox) * p.y.sw;
      const int64_t res_at = n * p.res.sn + int64_t(oy + r0) * p.res.sh + int64_t(ox) * p.res.sw;
      S* to = reinterpret_cast<S*>(p.y.data) + at + filters[0];
      const S* res = near && p.res.data
                         ? reinterpret_cast<const S*>(p.res.data) + res_at + filters[0]
                         : nullptr;
      for (int r = 0; r < gr; ++r) {
        const Band* a = band + (r0 + r) * in_row;
        A* o = scratch + int64_t(r) * nc * FT;
        for (int t = 0, c = 0; t < tiles; ++t) {
          const int m = base + (t < more);
          // The output, and what is added to it, come near while they are computed.
          for (int i = 0; near && i < m; ++i)
            for (int j = 0; j < NV; ++j) {
              if (!past) __builtin_prefetch(to + r * p.y.sh + (c + i) * p.y.sw + j * VL<A>, 1, 3);
              if (res)
                __builtin_prefetch(res + r * p.res.sh + (c + i) * p.res.sw + j * VL<A>, 0, 3);
            }
          Ahead::step<false>(ahead);
          if constexpr (std::is_same_v<decltype(steps.end.y), S*>) {
            if (finished) steps.end.y = to + r * p.y.sh + c * p.y.sw;
            if (finished && res) steps.end.res = res + r * p.res.sh + c * p.res.sw;
          }
          (t < more ? big : small)(a + c * in_pixel, in_pixel, steps, w, o + c * FT, FT);
          c += m;
        }
      }
      if (finished) continue;
      if (p.y.sc == 1 || p.y.sw != 1) {
        emit_pixels<S, A>(out, filters, s.lanes, s.contiguous, scratch, FT, gr, nc, at, res_at);
      } else {
        A* transposed = scratch + int64_t(scratch_pixels(nc)) * FT;
        const ptrdiff_t pitch = ceil_div(gr * nc, VL<A>) * VL<A>;
        transpose_scratch<A>(scratch, FT, gr * nc, s.lanes, transposed, pitch);
        for (int f = 0; f < s.lanes; ++f)
          emit_rows<S, A>(out, filters[f], transposed + f * pitch, nc, gr, nc, at, res_at);
      }
    }
  }

  void find_offsets(OffsetCache* cache) {
    off = direct ? filter_offsets<A>(L, cache, ya, xa, 0, 0)
                 : filter_offsets<A>(L, cache, ya, xa, int64_t(xa.entries) * Cb, Cb);
  }

  // What `Pooled` needs: bands of whole rows, of as many rows as it wants.
  static constexpr int kTileRows = 1;
  bool has_bands() const { return !direct && cols == p.Wo && p.y.sc == 1; }
  void lay_rows(int r) {
    rows = r;
    lay_axes(rows, cols);
  }
  size_t room_for_band() const {
    return ((size_t(ya.entries) * xa.entries * Cb + VL<Band>)*sizeof(Band) + 63) / 64 * 64;
  }
  size_t room_for_scratch() const { return scratch_bytes(cols) + (copies ? room_for_band() : 0); }
  void compute_rows(int64_t n, int oy, int nr, Band* band, A* scratch, Ahead& ahead) {
    const S* x = reinterpret_cast<const S*>(p.x.data) + n * p.x.sn;
    pack(x, oy, 0, nr, cols, band);
    int copied = -1;
    for (int s = 0; s < L.count; ++s) {
      const Segment& g = K::segments(L)[s];
      if (g.nv == 2)
        segment<2>(g, band, scratch, n, oy, 0, nr, cols, ahead, copied);
      else
        segment<1>(g, band, scratch, n, oy, 0, nr, cols, ahead, copied);
    }
  }
  Ahead input_of_rows(int64_t n, int oy) const { return input_of(n, oy, 0, L.count); }

  void run(OffsetCache* cache) {
    choose_band();
    find_offsets(cache);
    past_caches = non_temporal<S, A>(p);
    const int64_t nb = ceil_div(p.Ho, rows), strips = ceil_div(p.Wo, cols),
                  units = p.N * nb * strips;
    const int shares = shares_for(units, L.count, p.threads);
    const int64_t tasks = units * shares;
    const size_t band_room = direct ? 0 : room_for_band(), scratch_size = room_for_scratch();
    Tasks queue(tasks, p.threads);
    in_parallel(least<int64_t>(p.threads, tasks), [&](int self) {
      char* room = static_cast<char*>(workspace(band_room + scratch_size));
      Band* band = reinterpret_cast<Band*>(room);
      A* scratch = reinterpret_cast<A*>(room + band_room);
      int64_t held = -1;
      int copied = -1;  // of the band
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int64_t unit = task / shares, share = task % shares;
        const int64_t n = unit / (nb * strips);
        const int oy = int(unit / strips % nb) * rows, ox = int(unit % strips) * cols;
        const int nr = least(rows, p.Ho - oy), nc = least(cols, p.Wo - ox);
        const S* x = reinterpret_cast<const S*>(p.x.data) + n * p.x.sn;
        const Band* a = band;
        if (direct)
          a = reinterpret_cast<const Band*>(x + int64_t(oy * p.sh - p.pt) * p.x.sh +
                                            int64_t(ox * p.sw - p.pl) * p.x.sw);
        else if (held != unit) {
          pack(x, oy, ox, nr, nc, band);
          copied = -1;
        }
        held = unit;
        const int s0 = int(L.count * share / shares), s1 = int(L.count * (share + 1) / shares);
        const int64_t following = queue.expected(self);
        const int64_t next = following / shares;
        Ahead ahead;
        if (following >= 0 && next != unit)
          ahead = input_of(next / (nb * strips), int(next / strips % nb) * rows,
                           int(next % strips) * cols, s1 - s0);
        for (int s = s0; s < s1; ++s) {
          const Segment& g = K::segments(L)[s];
          if (g.nv == 2)
            segment<2>(g, a, scratch, n, oy, ox, nr, nc, ahead, copied);
          else
            segment<1>(g, a, scratch, n, oy, ox, nr, nc, ahead, copied);
        }
      }
      if (past_caches) non_temporal_fence();
    });
  }
};

template <class S, class A, class K = FilterColumns<A>>
static FiltersFprop<S, A, K> filters_fprop(const Lowered& L, const Problem& p, const void* packed) {
  return {L, p, static_cast<const A*>(packed)};
}

template <class S, class A, class K = FilterColumns<A>>
static void fprop_filters(const Lowered& L, OffsetCache* cache, const Problem& p,
                          const void* packed) {
  filters_fprop<S, A, K>(L, flatten_pointwise(L, p), packed).run(cache);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
