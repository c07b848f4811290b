// SPDX-License-Identifier: Apache-2.0
// How fprop with pixels in vectors cuts its output: bands of rows, strips of columns, small images
// side by side, and the rows that are computed together.
//
// Rows lie one after another in a packed band, so that a vector of pixels goes over their ends; the
// fewer vectors the rows of a sweep need, the less is computed for nothing. Example: rows of 56
// pixels, 57 apart, by vectors of 16: one takes 4 vectors (56 of 64 lanes used), two take 8, three
// take 11 (168 of 176).
#pragma once
#include "axis.h"
#include "micro_pixels.h"
#include "pack.h"
#include "plan.h"

namespace hetconv {
namespace HETCONV_NS {

// Entries to keep of a row: the zeros right of one row may be the zeros left of the next.
static inline int shared_gap_pitch(const Problem& p, const Axis& xa, int cols) {
  if (xa.pieces != 1) return xa.piece[0].len;
  const Piece& piece = xa.piece[0];
  if (cols != p.Wo) return piece.len;
  int lo, hi;
  inside(-p.pl + piece.rel, piece.istride, piece.len, p.W, &lo, &hi);
  return most(cols, piece.len - least(lo, piece.len - hi));
}

template <class S, class A> struct PixelBands {
  const Lowered& L;
  Problem p;
  Axis ya{}, xa{};
  Planar g{};
  int rows = 0, cols = 0, images = 0;  // of a band
  int swept = 1, at_once = 1;  // rows that a tile of filters computes in one go, and rows whose
                               // filters wait together
  bool direct = false, transposed = false;  // read x in place; the output wants filters innermost
  bool gather = false;  // all filters of a few rows wait in the scratch: to be transposed, or
                        // because tiles accumulate
  bool halves = false;  // the waiting rows are pooled, 2 x 2
  double macs_per_pixel = 0;

  PixelBands(const Lowered& lowered, const Problem& problem) : L(lowered), p(problem) {
    for (int t = 0; t < L.count; ++t) macs_per_pixel += double(L.tiles[t].nf) * L.tiles[t].ncols;
  }

  void lay(int r, int c, int m, bool copies) {
    rows = r;
    cols = c;
    images = m;
    axis_phases(&ya, L.KH, p.sh, p.dh, r);
    if (ya.entries > L.KH * r) axis_copies(&ya, L.KH, p.sh, p.dh, r);
    if (copies)
      axis_copies(&xa, L.KW, p.sw, p.dw, c);
    else
      axis_phases(&xa, L.KW, p.sw, p.dw, c);
    if (xa.entries > L.KW * c) axis_copies(&xa, L.KW, p.sw, p.dw, c);
    int longest = 0;
    for (int u = 0; u < xa.pieces; ++u) longest = most(longest, xa.piece[u].len);
    g.pitch = xa.pieces == 1 ? shared_gap_pitch(p, xa, c) : longest;
    g.images = m;
    g.spill = longest - g.pitch;
    g.row = int64_t(m) * g.pitch;
    g.piece = ya.entries * g.row;
    g.plane = ceil_div<int64_t>(xa.pieces * g.piece + g.spill, VL<A>) * VL<A>;
    if (g.plane * sizeof(A) % 1024 == 0) g.plane += 64 / int(sizeof(A));
  }
  size_t band_bytes() const { return size_t(g.plane) * L.nlive * sizeof(A); }
  // Elements of a filter's row; many filters cannot afford more than the vector that is read over.
  int spare_vectors() const { return gather && L.F > 512 ? 1 : kMostPixelVectors; }
  ptrdiff_t wide_for(int pixels) const {
    return ptrdiff_t(ceil_div(pixels, VL<A>) + spare_vectors()) * VL<A>;
  }
  size_t scratch_elements(int pixels) const {
    return size_t((gather ? L.F : kMaxPixelFilters) + kMaxPixelFilters) * size_t(wide_for(pixels));
  }

  // Pixels from the first of `units` rows to the last.
  int length_of(int units, int nc) const { return direct ? nc : (units - 1) * g.pitch + nc; }

  // Vectors of multiply-adds of `units` rows, swept `u` at a time. Tiles of three vectors are best,
  // and each sweep reads the weights anew.
  double work_of(int units, int u) const {
    const auto sweep = [&](int n) {
      const int length = length_of(n, cols), nvec = pixel_vectors<A>(length),
                tiles = ceil_div(nvec, 3);
      return nvec + 0.15 * pixels_over<A>(length) + 0.12 * (3 * tiles - nvec) + 0.25;
    };
    return units / u * sweep(u) + (units % u ? sweep(units % u) : 0.0);
  }
  // How many rows of a band are swept together, and wait together.
  void choose_rows_at_once() {
    const int units = rows * images, step = halves ? 2 : 1;
    swept = at_once = direct ? 1 : units;
    if (direct || !gather) return;
    const int64_t room =
        int64_t((transposed ? kTransposeBytes : 2 * kTransposeBytes) / sizeof(A)) / most(1, L.F);
    const int limit = most(step, least(units, int(least<int64_t>(room, 1024)) / g.pitch));
    double best = -1;
    for (int u = 1; u <= limit; ++u) {
      const int waiting = u % step ? step * u : u;
      // Sums are added to what is there: no sweep may touch the rows of another.
      if (waiting > limit || (L.accumulate && waiting != u)) continue;
      const double work = work_of(units, u);
      if (best >= 0 && work >= best) continue;
      best = work;
      swept = u;
      at_once = waiting;
    }
  }
  int64_t units() const {
    return ceil_div<int64_t>(p.N, images) * ceil_div(p.Ho, rows) * ceil_div(p.Wo, cols);
  }
  // Whether the tiles of a band are shared among threads, because a few bands do not share out
  // evenly. Filters are then written in smaller pieces.
  bool shares_tiles() const {
    return !L.accumulate && units() % p.threads != 0 && units() < 8 * p.threads;
  }
  // Cycles until the last thread is done: whole vectors of multiply-adds, packing, and a part of a
  // band for what a thread waits for others.
  double cost() const {
    const int bands = ceil_div(p.Ho, rows), last = p.Ho - (bands - 1) * rows;
    const double pairs = double(ceil_div<int64_t>(p.N, images)) * ceil_div(p.Wo, cols);
    const double packing = 0.35 * double(g.plane) * L.nlive, halo = p.KH - 1;
    const double whole = work_of(rows * images, swept) * macs_per_pixel / 2 + packing;
    const double rest = work_of(last * images, swept) * macs_per_pixel / 2 +
                        packing * (last + halo) / (rows + halo);
    const double all = pairs * ((bands - 1) * whole + rest) / p.threads;
    if (p.threads == 1) return all;
    const int64_t wholes = int64_t(pairs) * (last == rows ? bands : bands - 1);
    const double time =
        most(all, double(ceil_div<int64_t>(wholes, p.threads)) * whole) + 0.15 * whole;
    return shares_tiles() ? 1.1 * time : time;
  }

  void choose_band() {
    transposed = p.y.sw != 1 && p.y.sc == 1;
    gather = transposed || L.accumulate;
    direct =
        sizeof(S) == sizeof(A) && p.x.sw == 1 && L.KH == 1 && L.KW == 1 && p.H == 1 && p.Ho == 1 &&
        p.sw == 1 && p.pl == 0 && p.pt == 0 && p.W == p.Wo && p.W >= (p.N > 1 ? 128 : VL<A>) &&
        p.x.sc * p.C < (int64_t(1) << 31) &&
        (!L.accumulate || p.W % VL<A> == 0);  // the last vectors overlap: they would be added twice
    if (direct)
      choose_strips();
    else
      choose_rows();
  }

  // Chooses a band whose accumulators are pooled 2 x 2 before anything else happens to them; false:
  // that is not this pooling, gives another result, or does not fit. A shift and a ReLU keep the
  // order of numbers, so that the largest may be taken first.
  bool choose_halves() {
    const Pool& q = *p.pool;
    const bool square = q.KH == 2 && q.KW == 2 && q.sh == 2 && q.sw == 2 && q.pt == 0 && q.pl == 0;
    const bool ordered = p.act == Act::none || p.act == Act::relu || p.act == Act::relu6;
    if (!square || !ordered || p.scale || p.res.data || p.y.sc != 1) return false;
    const Problem before = p;
    p.Ho = 2 * q.Ho;
    p.Wo = 2 * q.Wo;
    halves = true;
    choose_band();
    if (!direct && transposed &&
        band_bytes() + scratch_elements(length_of(at_once, cols)) * sizeof(A) + 2048 <=
            kWorkspaceBytes)
      return true;
    halves = false;
    p = before;
    return false;
  }

 private:
  void choose_strips() {
    g = Planar{1, 0, 0, 0, 0, p.x.sc};
    rows = images = swept = at_once = 1;
    const int64_t want = most<int64_t>(256, int64_t(kBandBytes / sizeof(A)) / most(1, L.nlive));
    const int64_t room = gather ? int64_t(kImageBlockBytes / sizeof(A)) / L.F - wide_for(0) : want;
    const int64_t fewest = L.F > 512 ? VL<A> : 128;
    int64_t strips = ceil_div<int64_t>(p.Wo, most(fewest, least(want, room)));
    if (p.N * strips < 2 * p.threads) strips = least<int64_t>(most(1, p.Wo / 128), strips * 2);
    // Shares of the tiles would be transposed in pieces, and fetched from other cores.
    if (p.N % p.threads != 0 && p.Wo >= 64 * p.threads)
      strips = ceil_div<int64_t>(strips, p.threads) * p.threads;
    const int each = int(ceil_div<int64_t>(p.Wo, strips));
    cols = ceil_div(each, VL<A>) * VL<A>;
    // A few pixels over whole vectors cost less than strips of several widths.
    if (pixels_over<A>(each) && p.Wo - (strips - 1) * each >= VL<A> && !L.accumulate) cols = each;
    if (p.Wo % cols != 0 && p.Wo % cols < VL<A>) cols += VL<A>;  // the last must fill one vector
    g.pitch = cols = least(cols, p.Wo);
  }
  // Lays a band and returns its cost.
  double lay_out(int r, int c, int m, bool copies) {
    lay(r, c, m, copies);
    choose_rows_at_once();
    return cost();
  }
  // A width of strips that keeps what is pooled together.
  int even(int c) const { return halves ? ceil_div(c, 2) * 2 : c; }

  void choose_rows() {
    const int step = halves ? 2 : 1;
    cols = p.Wo;
    lay(step, cols, 1, false);
    while (cols > 64 && (band_bytes() > kWorkspaceBytes / 2 ||
                         scratch_elements(step * g.pitch) * sizeof(A) > kWorkspaceBytes / 3))
      lay(step, even(ceil_div(cols, 2)), 1, false);
    while (cols > step &&
           band_bytes() + scratch_elements(step * g.pitch) * sizeof(A) > kWorkspaceBytes - 2048)
      lay(step, even(ceil_div(cols, 2)), 1, false);
    // Narrow strips take more rows, and so pack fewer rows twice; where channels are planes in
    // memory they would read pieces of their rows, and `Pooled` wants whole ones.
    const bool narrow = p.x.sw != 1 && (!p.pool || halves);
    const int widest = cols, strips = ceil_div(p.Wo, cols);
    const bool small = p.Ho * p.Wo <= 1024 && !halves;
    double best = -1;
    int best_r = step, best_c = cols;
    bool best_copies = false;
    const auto take = [&](double cost, int r, int c, bool copies) {
      if (best >= 0 && cost >= best) return;
      best = cost;
      best_r = r;
      best_c = c;
      best_copies = copies;
    };
    for (int s = strips; s == strips || (narrow && p.Wo / s >= 64); ++s) {
      const int c = least(widest, even(ceil_div(p.Wo, s)));
      for (int r = step; r <= p.Ho; r += step) {
        const double each = lay_out(r, c, 1, false);
        if (r > step && (band_bytes() > kPlanarBandBytes || r * g.pitch > 2048)) break;
        take(each, r, c, false);
        // Whether each horizontal tap has its own copy: then there is no gap between rows. Not of
        // several bands for a thread, which would read the weights again.
        if (!small || L.KW == 1 || units() > p.threads) continue;
        const double copied = lay_out(r, c, 1, true);
        if (band_bytes() <= kPlanarBandBytes) take(copied, r, c, true);
      }
    }
    const int bands = ceil_div(p.Ho, best_r);
    if (p.N * bands * ceil_div(p.Wo, best_c) < p.threads)
      best_r = even(ceil_div(p.Ho, least(p.Ho, 2 * bands)));
    best = lay_out(best_r, best_c, 1, best_copies);
    if (best_r < p.Ho || best_c < p.Wo || !small) return;
    // How many small images side by side.
    int best_m = 1;
    for (int m = 1; m <= p.N && m * best_r * p.Wo <= 2048; ++m) {
      if (ceil_div<int64_t>(p.N, m) < p.threads && m > 1) break;
      for (int copies = 0; copies < 2; ++copies) {
        const double c = lay_out(best_r, best_c, m, copies);
        if (band_bytes() > kImageBlockBytes || c >= best) continue;
        best = c;
        best_m = m;
        best_copies = copies;
      }
    }
    lay_out(best_r, best_c, best_m, best_copies);
  }
};

}  // namespace HETCONV_NS
}  // namespace hetconv
