// SPDX-License-Identifier: Apache-2.0
// Bands of input rows in 8 bits, with their halo: padding is there as the zero point, and every
// byte is unsigned. What a band of each form is: int8_filter_bands.h and int8_pixel_bands.h.
#pragma once
#include "axis.h"
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kSlack = 64;  // bytes beyond a band that steps may read and rows may write

// Appends to each pixel's bytes those of the channels in `masks`; writes up to 63 bytes more.
#if defined(__AVX512BW__)
__attribute__((target("avx512vbmi2"))) static void compress_pixels(
    const uint8_t* x, int64_t px, int n, int C, const uint64_t* masks, int classes, int words,
    uint8_t flip, uint8_t* to, int64_t pitch) {
  const __m512i flips = _mm512_set1_epi8(char(flip));
  const __mmask64 last = C % 64 ? (uint64_t(1) << C % 64) - 1 : ~uint64_t(0);
  for (int i = 0; i < n; ++i, x += px, to += pitch) {
    uint8_t* d = to;
    for (int k = 0; k < classes; ++k)
      for (int w = 0; w < words; ++w) {
        const uint64_t mask = masks[k * words + w];
        if (!mask) continue;
        const __m512i v = _mm512_maskz_loadu_epi8(w + 1 < words ? ~uint64_t(0) : last, x + 64 * w);
        _mm512_storeu_si512(d, _mm512_maskz_compress_epi8(mask, _mm512_xor_si512(v, flips)));
        d += __builtin_popcountll(mask);
      }
  }
}
#endif

static inline void flip_copy(const uint8_t* from, int64_t n, uint8_t flip, uint8_t* to) {
  if (!flip) {
    memcpy(to, from, size_t(n));
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] ^ flip;
}

struct Int8Bands {
  const Int8Lowered& L;
  const Int8Problem& p;
  Axis ya{}, xa{};
  int rows = 1, cols = 1;  // outputs of a band
  bool packs = false;      // something reads a band, and not memory itself
  bool patches = false;    // of each output pixel a copy of the row of taps that it reads

  Int8Bands(const Int8Lowered& lowered, const Int8Problem& problem) : L(lowered), p(problem) {}

  // What a form says of its bands, once a call.
  virtual void look_at_blocks() = 0;                     // sets `packs`
  virtual void lay_axes() = 0;                           // for `rows` and `cols`
  virtual int64_t band_bytes(int r, int c) const = 0;    // of r x c outputs, before it is laid
  virtual size_t room() const = 0;                       // of a band, once it is laid
  virtual void fit(int* r, int* c) const = 0;            // the band that is best
  virtual int64_t most_pooled_bytes() const = 0;         // of a band and its outputs
  virtual int shares_for(int64_t units) const = 0;       // of the blocks, among threads
  virtual int key() const = 0;                           // tells bands apart by their offsets
  virtual void place_steps(int32_t* offsets) const = 0;  // where each one reads

  int64_t entries() const { return int64_t(ya.entries) * xa.entries; }
  int64_t pixel(int order) const {
    const Int8Order& o = L.order[order];
    return patches ? int64_t(L.KW) * L.C : o.pitch;
  }

  void lay(int r, int c) {
    rows = r;
    cols = c;
    lay_axes();
  }

  void choose() {
    look_at_blocks();
    int r = 1, c = p.Wo;
    fit(&r, &c);
    // Enough bands for every thread, and of equal height.
    if (p.Ho == 1 && p.N * ceil_div(p.Wo, c) < 2 * p.threads && p.Wo > 56 * p.threads)
      c = ceil_div(ceil_div(p.Wo, 2 * p.threads), 28) * 28;
    int64_t nb = ceil_div(p.Ho, r);
    if (p.N * ceil_div(p.Wo, c) * nb < p.threads) nb = least<int64_t>(p.Ho, nb * 2);
    lay(int(ceil_div<int64_t>(p.Ho, nb)), c);
  }

  // Bands of whole rows whose outputs, `row` bytes each, wait to be pooled: how many pooled rows;
  // 0: not even one fits.
  int choose_pooled(int64_t row) {
    look_at_blocks();
    const Pool& q = *p.pool;
    int pooled = 0;
    for (int more = 1; more <= q.Ho; ++more) {
      const int r = int(least<int64_t>(p.Ho, (more - 1) * int64_t(q.sh) + q.KH));
      const int64_t in = packs ? band_bytes(r, p.Wo) : 0, out = r * row;
      if (in + out + 4096 > int64_t(kWorkspaceBytes)) break;
      if (more > 1 && in + out > most_pooled_bytes()) break;
      pooled = more;
    }
    if (pooled == 0) return 0;
    int64_t nb = ceil_div(q.Ho, pooled);
    if (p.N * nb < p.threads) nb = least<int64_t>(q.Ho, nb * 2);
    pooled = int(ceil_div<int64_t>(q.Ho, nb));
    lay(int(least<int64_t>(p.Ho, (pooled - 1) * int64_t(q.sh) + q.KH)), p.Wo);
    return pooled;
  }

  const int32_t* offsets(OffsetCache* cache) const {
    OffsetKey of;
    memset(&of, 0, sizeof of);
    of.v[0] = xa.entries;
    of.v[1] = key();
    of.v[2] = ya.entries;
    for (int k = 0; k < L.KH; ++k) of.v[4 + k] = ya.start[k];
    for (int k = 0; k < L.KW && !patches; ++k) of.v[4 + kMaxKernel + k] = xa.start[k];
    if (const int* found = offsets_find(cache, of)) return found;
    int* off = static_cast<int*>(malloc(sizeof(int) * size_t(L.nsteps + 1)));
    if (!off) out_of_memory();
    place_steps(off);
    return offsets_keep(cache, of, off, sizeof(int) * size_t(L.nsteps + 1));
  }

  // `n` pixels `px` bytes apart.
  void copy_pixels(const Int8Order& o, const uint8_t* x, int64_t px, int n, uint8_t* to) const {
    const uint8_t flip = flip_of(p.x_type);
    if (o.identity) {
      if (px == p.C && o.pitch == p.C) {
        flip_copy(x, int64_t(n) * p.C, flip, to);
        return;
      }
      for (int i = 0; i < n; ++i) flip_copy(x + i * px, p.C, flip, to + int64_t(i) * o.pitch);
      return;
    }
#if defined(__AVX512BW__)
    if (L.compress) {
      compress_pixels(x, px, n, p.C, L.masks + o.mask0, o.classes, (p.C + 63) / 64, flip, to,
                      o.pitch);
      return;
    }
#endif
    const int* channels = L.channels + o.channel0;
    for (int i = 0; i < n; ++i, x += px, to += o.pitch)
      for (int c = 0; c < o.channels; ++c) to[c] = x[channels[c]] ^ flip;
  }

  void pack_row(const Int8Order& o, const uint8_t* x, int ox, int nc, uint8_t* to) const {
    const int blank = unsigned_zero(p.x_type, p.x_zero);
    if (patches) {
      for (int j = 0; j < nc; ++j)
        for (int k = 0; k < L.KW; ++k, to += p.C) {
          const int64_t ix = (int64_t(ox) + j) * p.sw - p.pl + int64_t(k) * p.dw;
          if (ix < 0 || ix >= p.W)
            memset(to, blank, size_t(p.C));
          else
            flip_copy(x + ix * p.C, p.C, flip_of(p.x_type), to);
        }
      return;
    }
    const int64_t pitch = o.pitch;
    for (int u = 0; u < xa.pieces; ++u) {
      const Piece& piece = xa.piece[u];
      const int n = piece_length(xa, piece, nc), first = ox * p.sw - p.pl + piece.rel;
      int lo, hi;
      inside(first, piece.istride, n, p.W, &lo, &hi);
      uint8_t* d = to + piece.e0 * pitch;
      memset(d, blank, size_t(lo * pitch));
      if (hi > lo)
        copy_pixels(o, x + (int64_t(first) + int64_t(lo) * piece.istride) * p.C,
                    int64_t(piece.istride) * p.C, hi - lo, d + lo * pitch);
      memset(d + hi * pitch, blank, size_t((n - hi) * pitch));
    }
  }

  // The input of `nr` x `nc` outputs from (oy, ox) on.
  void pack(int order, int64_t n, int oy, int ox, int nr, int nc, uint8_t* band) const {
    const Int8Order& o = L.order[order];
    const int64_t row = xa.entries * pixel(order);
    for (int u = 0; u < ya.pieces; ++u) {
      const Piece& piece = ya.piece[u];
      const int height = piece_length(ya, piece, nr);
      for (int i = 0; i < height; ++i) {
        const int64_t iy = int64_t(oy) * p.sh - p.pt + piece.rel + int64_t(i) * piece.istride;
        uint8_t* to = band + (piece.e0 + i) * row;
        if (iy < 0 || iy >= p.H)
          memset(to, unsigned_zero(p.x_type, p.x_zero), size_t(row));
        else
          pack_row(o, p.x + (n * p.H + iy) * p.W * p.C, ox, nc, to);
      }
    }
  }
};

}  // namespace HETCONV_NS
}  // namespace hetconv
