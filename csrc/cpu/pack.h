// SPDX-License-Identifier: Apache-2.0
// Packing of one band of input rows: padding, memory format, stride and storage type are absorbed
// here. It is no im2col: a pixel is packed once, and every tap reads it at an offset of its own.
#pragma once
#include "axis.h"
#include "choose.h"

namespace hetconv {
namespace HETCONV_NS {

template <class A> HC_INLINE void zero_fill(A* p, int64_t n) {
  for (; n >= VL<A>; n -= VL<A>, p += VL<A>) store<A>(p, Vec<A>{});
  if (n > 0) store_n<A>(p, Vec<A>{}, int(n));
}

// n pixels of one plane, `step` apart, 1 or 2, at most a vector of them; nothing beyond the last is
// read. P: a pointer to elements, or a Source.
template <class S, class A, class P> HC_INLINE Vec<A> read_pixels(P s, int64_t step, int n) {
  if (step == 1) return n == VL<A> ? read<S, A>(s) : read_n<S, A>(s, n);
  const auto lanes = std::make_integer_sequence<int, VL<A>>();
  const int last = 2 * n - 1;  // what lies between is read
  return every_other<A, 0>(read_n<S, A>(s, least(VL<A>, last)),
                           last > VL<A> ? read_n<S, A>(s + VL<A>, last - VL<A>) : Vec<A>{}, lanes);
}

// One input row (already at its row, column 0) to channels-last band entries [e0 + lo, e0 + hi).
template <class S, class A>
static void pack_run_channels_last(const S* x, int64_t sc, int64_t sh, int64_t sw, int C, int first,
                                   int istride, int n, A* d, int Cb) {
  const int64_t px = istride * sw;
  x += int64_t(first) * sw;
  if (sc == 1) {
    if constexpr (sizeof(S) == sizeof(A))
      if (px == C && Cb == C) {
        memcpy(static_cast<void*>(d), x, size_t(n) * C * sizeof(A));
        return;
      }
    const int full = C / VL<A> * VL<A>;
    for (int j = 0; j < n; ++j, d += Cb, x += px) {
      int c = 0;
      for (; c < full; c += VL<A>) store<A>(d + c, read<S, A>(x + c));
      if (c < C) {
        store_n<A>(d + c, read_n<S, A>(x + c, C - c), least(VL<A>, Cb - c));
        c += VL<A>;
      }
      if (c < Cb) zero_fill(d + c, Cb - c);
    }
  } else if (px == 1 || px == 2) {
    for (int c0 = 0; c0 < Cb; c0 += VL<A>)
      for (int j0 = 0; j0 < n; j0 += VL<A>) {
        const int m = least(VL<A>, n - j0);
        Vec<A> r[VL<A>];
        if (px == 1 && m == VL<A> && c0 + VL<A> <= C) {
          // So many planes at once are more streams than the hardware follows: ask for the row
          // after the next.
          HC_UNROLL for (int i = 0; i < VL<A>; ++i) {
            r[i] = read<S, A>(x + (c0 + i) * sc + j0);
            __builtin_prefetch(x + (c0 + i) * sc + j0 + 2 * sh, 0, 2);
          }
        } else {
          for (int i = 0; i < VL<A>; ++i)
            r[i] = c0 + i < C ? read_pixels<S, A>(x + (c0 + i) * sc + j0 * px, px, m) : Vec<A>{};
        }
        transpose<A>(r);
        for (int j = 0; j < m; ++j) store<A>(d + int64_t(j0 + j) * Cb + c0, r[j]);
      }
  } else {
    for (int j = 0; j < n; ++j, d += Cb, x += px) {
      for (int c = 0; c < C; ++c) d[c] = widen(x[c * sc]);
      zero_fill(d + C, Cb - C);
    }
  }
}

// Band [row entry][column entry][Cb] for `rows` x `cols` outputs from output (oy, ox) of one image.
template <class S, class A>
static void pack_channels_last(const Problem& p, const S* x, const Axis& ya, const Axis& xa, int oy,
                               int ox, int rows, int cols, int Cb, A* band) {
  for (int q = 0; q < ya.pieces; ++q) {
    const Piece& yp = ya.piece[q];
    for (int i = 0, n = piece_length(ya, yp, rows); i < n; ++i) {
      const int iy = oy * p.sh - p.pt + yp.rel + i * yp.istride;
      A* row = band + int64_t(yp.e0 + i) * xa.entries * Cb;
      for (int u = 0; u < xa.pieces; ++u) {
        const Piece& xp = xa.piece[u];
        const int len = piece_length(xa, xp, cols), first = ox * p.sw - p.pl + xp.rel;
        A* d = row + int64_t(xp.e0) * Cb;
        if (iy < 0 || iy >= p.H) {
          zero_fill(d, int64_t(len) * Cb);
          continue;
        }
        int lo, hi;
        inside(first, xp.istride, len, p.W, &lo, &hi);
        zero_fill(d, int64_t(lo) * Cb);
        if (hi > lo)
          pack_run_channels_last<S, A>(x + int64_t(iy) * p.x.sh, p.x.sc, p.x.sh, p.x.sw, p.C,
                                       first + lo * xp.istride, xp.istride, hi - lo,
                                       d + int64_t(lo) * Cb, Cb);
        zero_fill(d + int64_t(hi) * Cb, int64_t(len - hi) * Cb);
      }
    }
  }
}

// Planar band: [channel][column piece][row entry][image][pitch].
struct Planar {
  int images, pitch,
      spill;  // images side by side in a row; entries kept of each row; zeros read beyond the last
  int64_t row, piece, plane;  // strides in elements
};

// Which channels to pack, ascending; the i-th goes into plane i.
struct Channels {
  const int* live;
  int n;
};

// One row piece, channels innermost in memory: whole vectors along channels, transposed. The valid
// entries only. The input is asked for one block of pixels ahead: its lines are read in an order
// that the hardware does not guess.
template <class S, class A>
static void transpose_planar_row(Source<S> src, int64_t px, int C, const Channels& from, int lo,
                                 int hi, A* d, int64_t plane) {
  for (int j0 = lo; j0 < hi; j0 += VL<A>, src += VL<A> * px) {
    const int m = least(VL<A>, hi - j0);
    for (int i = 0; i < from.n;) {
      const int c0 = from.live[i] / VL<A> * VL<A>;
      Vec<A> r[VL<A>];
      if (c0 + VL<A> <= C) {
        HC_UNROLL for (int j = 0; j < VL<A>; ++j) {
          const Source<S> at = src + least(j, m - 1) * px + c0;
          __builtin_prefetch(address(at + VL<A> * px), 0, 3);
          r[j] = read<S, A>(at);
        }
      } else {
        for (int j = 0; j < VL<A>; ++j)
          r[j] = read_n<S, A>(src + least(j, m - 1) * px + c0, C - c0);
      }
      transpose<A>(r);
      for (; i < from.n && from.live[i] < c0 + VL<A>; ++i) {
        if (m == VL<A>)
          store<A>(d + i * plane + j0, r[from.live[i] - c0]);
        else
          store_n<A>(d + i * plane + j0, r[from.live[i] - c0], m);
      }
    }
  }
}

// n pixels, px apart, as they are.
template <class S, class A> HC_INLINE void copy_row(Source<S> s, int64_t px, int n, A* t) {
  if (px != 1 && px != 2) {
    for (int j = 0; j < n; ++j) t[j] = widen(s[j * px]);
    return;
  }
  int j = 0;
  for (; j + VL<A> <= n; j += VL<A>) store<A>(t + j, read_pixels<S, A>(s + j * px, px, VL<A>));
  if (j < n) store_n<A>(t + j, read_pixels<S, A>(s + j * px, px, n - j), n - j);
}

// The entries of a piece that are packed, of which [lo, hi) lie inside the input.
struct Part {
  int first, lo, hi, len;  // first: coordinate of entry 0
};
static inline Part part_of(const Piece& piece, int origin, int len, int size) {
  Part r{origin + piece.rel, 0, 0, len};
  inside(r.first, piece.istride, len, size, &r.lo, &r.hi);
  return r;
}

// Rows of one plane, s_row apart, to a band's, `pitch` apart: of each the zeros left of the input,
// then its pixels. A row is written by whole vectors; what they write beyond it is written next.
// soon: from here to what is read soon, or 0.
template <class A, class Source>
using PadRows = void (*)(Source s, int64_t s_row, int rows, const Part& x, A* t, int pitch,
                         int64_t soon);

template <class S, class A, int PX, int NV>
static void pad_rows(Source<S> s, int64_t s_row, int rows, const Part& x, A* t, int pitch,
                     int64_t soon) {
  const int lo = x.lo, last = x.hi - x.lo - (NV - 1) * VL<A>;
  for (int r = 0; r < rows; ++r, s += s_row, t += pitch) {
    if (soon)
      HC_UNROLL for (int j = 0; j < NV * PX; ++j)
          __builtin_prefetch(address(s + (soon + j * VL<A>)), 0, 3);
    if (lo > 0) store<A>(t, Vec<A>{});
    HC_UNROLL for (int j = 0; j < NV; ++j) store<A>(
        t + lo + j * VL<A>, read_pixels<S, A>(s + j * VL<A> * PX, PX, j < NV - 1 ? VL<A> : last));
  }
}

constexpr int kMostPadded = 4;  // vectors of a row that is padded by `pad_rows`

template <class S, class A>
static PadRows<A, Source<S>> pad_rows_for(const Part& x, int64_t px, int pitch) {
  const int n = x.hi - x.lo, nv = ceil_div(n, VL<A>);
  if (n <= 0 || nv > kMostPadded || x.lo > VL<A> || pitch - x.lo > nv * VL<A>) return nullptr;
  return choose<PadRows<A, Source<S>>, kMostPadded>(nv, [px](auto v) -> PadRows<A, Source<S>> {
    return px == 1 ? pad_rows<S, A, 1, v()> : px == 2 ? pad_rows<S, A, 2, v()> : nullptr;
  });
}

constexpr int kPlanesAhead = 2;

// From planes of pixels, one by one: each is read in one sweep.
template <class S, class A>
static void pack_from_planes(const Problem& p, Images<S> x, const Channels& from, const Axis& ya,
                             const Axis& xa, const Planar& g, int64_t n0, int images,
                             const Part* down, const Part* across, A* band) {
  PadRows<A, Source<S>> pads[kMaxKernel];
  for (int u = 0; u < xa.pieces; ++u)
    pads[u] = pad_rows_for<S, A>(across[u], int64_t(xa.piece[u].istride) * p.x.sw, g.pitch);
  for (int block = 0; block < from.n; ++block, band += g.plane) {
    // Rows of planes are read in an order that the hardware does not guess.
    const int64_t soon = block + kPlanesAhead < from.n
                             ? int64_t(from.live[block + kPlanesAhead] - from.live[block]) * p.x.sc
                             : 0;
    for (int u = 0; u < xa.pieces; ++u) {
      const Part& xp = across[u];
      const int64_t px = int64_t(xa.piece[u].istride) * p.x.sw;
      const auto put = [&](Source<S> s, int64_t s_row, int rows, A* d) {
        // Whole vectors as long as they write this plane alone.
        int fast = pads[u] ? rows : 0;
        while (fast > 0 && d + fast * g.pitch + VL<A> > band + g.plane) --fast;
        if (fast > 0) {
          pads[u](s, s_row, fast, xp, d, g.pitch, u == 0 ? soon : 0);
          s += fast * s_row;
          d += fast * g.pitch;
        }
        for (int r = fast; r < rows; ++r, s += s_row, d += g.pitch) {
          zero_fill(d, xp.lo);
          copy_row<S, A>(s, px, xp.hi - xp.lo, d + xp.lo);
          zero_fill(d + xp.hi, g.pitch - xp.hi);
        }
      };
      for (int q = 0; q < ya.pieces; ++q) {
        const Part& yp = down[q];
        const int lo = xp.hi > xp.lo ? yp.lo : yp.len, hi = most(lo, yp.hi);
        // The stride of an only row has no meaning.
        const int64_t s_row = hi - lo > 1 ? ya.piece[q].istride * p.x.sh : 0;
        A* d = band + u * g.piece + ya.piece[q].e0 * g.row;
        zero_fill(d, lo * g.row);
        d += lo * g.row;
        const int64_t at = hi == lo ? 0
                                    : from.live[block] * p.x.sc +
                                          int64_t(yp.first + lo * ya.piece[q].istride) * p.x.sh +
                                          int64_t(xp.first + xp.lo * xa.piece[u].istride) * p.x.sw;
        if (g.images == 1) {
          if (hi > lo) put(image_of(x, n0, p.x.sn) + at, s_row, hi - lo, d);
        } else {
          for (int i = lo; i < hi; ++i) {
            A* row = d + (i - lo) * g.row;
            for (int m = 0; m < images; ++m)
              put(image_of(x, n0 + m, p.x.sn) + (at + (i - lo) * s_row), 0, 1, row + m * g.pitch);
            zero_fill(row + images * g.pitch, (g.images - images) * g.pitch);
          }
        }
        d += (hi - lo) * g.row;
        // Taps right of the last row read the zeros that would start the next one.
        zero_fill(d, (yp.len - hi) * g.row + g.spill);
      }
    }
  }
}

// From pixels with their channels innermost.
template <class S, class A>
static void pack_from_pixels(const Problem& p, Images<S> x, const Channels& from, const Axis& ya,
                             const Axis& xa, const Planar& g, int64_t n0, int images,
                             const Part* down, const Part* across, A* band) {
  for (int u = 0; u < xa.pieces; ++u) {
    const Part& xp = across[u];
    const int64_t px = int64_t(xa.piece[u].istride) * p.x.sw;
    for (int q = 0; q < ya.pieces; ++q) {
      const Part& yp = down[q];
      A* d = band + u * g.piece + ya.piece[q].e0 * g.row;
      for (int i = 0; i < yp.len; ++i) {
        const bool blank = i < yp.lo || i >= yp.hi || xp.hi <= xp.lo;
        const int64_t at = blank ? 0
                                 : int64_t(yp.first + i * ya.piece[q].istride) * p.x.sh +
                                       int64_t(xp.first + xp.lo * xa.piece[u].istride) * p.x.sw;
        for (int m = 0; m < g.images; ++m, d += g.pitch) {
          if (blank || m >= images) {
            for (int c = 0; c < from.n; ++c) zero_fill(d + c * g.plane, g.pitch);
            continue;
          }
          transpose_planar_row<S, A>(image_of(x, n0 + m, p.x.sn) + at, px, p.C, from, xp.lo, xp.hi,
                                     d, g.plane);
          for (int c = 0; c < from.n; ++c) {
            zero_fill(d + c * g.plane, xp.lo);
            zero_fill(d + c * g.plane + xp.hi, g.pitch - xp.hi);
          }
        }
      }
      // Taps right of the last row read the zeros that would start the next one.
      if (g.spill > 0)
        for (int c = 0; c < from.n; ++c) zero_fill(d + c * g.plane, g.spill);
    }
  }
}

// `rows` x `cols` outputs from output (oy, ox) of images n0 .. n0 + images.
template <class S, class A>
static void pack_planar(const Problem& p, Images<S> x, const Channels& from, const Axis& ya,
                        const Axis& xa, const Planar& g, int64_t n0, int images, int oy, int ox,
                        int rows, int cols, A* band) {
  Part across[kMaxKernel], down[kMaxKernel];
  for (int u = 0; u < xa.pieces; ++u)
    across[u] = part_of(xa.piece[u], ox * p.sw - p.pl,
                        least(piece_length(xa, xa.piece[u], cols), g.pitch), p.W);
  for (int q = 0; q < ya.pieces; ++q)
    down[q] = part_of(ya.piece[q], oy * p.sh - p.pt, piece_length(ya, ya.piece[q], rows), p.H);
  const auto pack = p.x.sw != 1 && p.x.sc == 1 ? pack_from_pixels<S, A> : pack_from_planes<S, A>;
  pack(p, x, from, ya, xa, g, n0, images, down, across, band);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
