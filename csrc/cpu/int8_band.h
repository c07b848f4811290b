// SPDX-License-Identifier: Apache-2.0
// Bands of input rows in 8 bits, with their halo: padding is there as the zero point, and every
// byte is unsigned. Layers that need neither padding nor another order read memory itself.
#pragma once
#include "axis.h"
#include "int8_finish.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int64_t kInt8BandBytes = 192 << 10;
constexpr int kInt8TasksPerThread = 32;
constexpr int kInt8Together = 8;                // blocks that take turns
constexpr int64_t kInt8NearBytes = 18 << 10;    // of their weights
constexpr int kInt8BandsPerThread = 8;          // where all blocks do
constexpr int64_t kInt8PixelBytes = 448 << 10;  // of a band with pixels in vectors, and its copies
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

// Bytes of what is kept of a band where pixels are in vectors (see int8_pixels.h).
struct Int8PixelRoom {
  int64_t band, planes, quads, results, residual;
  int64_t all() const { return band + planes + quads + results + residual; }
};

struct Int8Bands {
  const Int8Lowered& L;
  const Int8Problem& p;
  Axis ya{}, xa{};
  int rows = 1, cols = 1;  // outputs of a band
  bool direct = false;     // blocks in the order of memory read memory
  bool packs = false;      // some block reads a band
  bool patches = false;    // of each output pixel a copy of the row of taps that it reads
  int64_t widest = 0;      // bytes of a pixel in a band

  Int8Bands(const Int8Lowered& lowered, const Int8Problem& problem) : L(lowered), p(problem) {}

  bool reads_directly(const Int8Block& b) const { return direct && L.order[b.order].identity; }
  int64_t pixel(int order) const {
    const Int8Order& o = L.order[order];
    return patches ? int64_t(L.KW) * L.C : o.pitch;
  }
  int64_t in_pixel(const Int8Block& b) const {
    return reads_directly(b) ? int64_t(p.sw) * p.C : xa.step * pixel(b.order);
  }
  int64_t in_row(const Int8Block& b) const {
    return reads_directly(b) ? int64_t(p.sh) * p.W * p.C
                             : int64_t(ya.step) * xa.entries * pixel(b.order);
  }

  void lay(int r, int c) {
    rows = r;
    cols = c;
    axis_shared(&ya, L.KH, p.sh, p.dh, r);
    if (ya.entries > L.KH * r) axis_copies(&ya, L.KH, p.sh, p.dh, r);
    axis_shared(&xa, L.KW, p.sw, p.dw, c);
    if (L.tiles) {  // neighbouring outputs read neighbouring entries
      axis_neighbours(&ya, L.KH, p.sh, p.dh, r);
      axis_neighbours(&xa, L.KW, p.sw, p.dw, c);
      return;
    }
    const bool wasteful = xa.entries > L.KW * c;
    patches = L.span && (wasteful || p.dw != 1);
    if (patches) {
      axis_shared(&xa, 1, 1, 1, c);
    } else if (wasteful) {
      axis_copies(&xa, L.KW, p.sw, p.dw, c);
    }
  }
  int64_t entries() const { return int64_t(ya.entries) * xa.entries; }
  // A plane of so many pixels: whole vectors, and as much again as a tile may go beyond the end.
  static int64_t plane_of(int64_t pixels) {
    const int64_t plane = ceil_div<int64_t>(pixels, 64) * 64 + 64;
    return plane % 1024 == 0 ? plane + 64 : plane;
  }
  static int64_t staged_pitch(int channels) { return int64_t(ceil_div(channels, 64)) * 64; }
  Int8PixelRoom pixel_room(int r, int c) const {
    Axis y, x;
    axis_neighbours(&y, L.KH, p.sh, p.dh, r);
    axis_neighbours(&x, L.KW, p.sw, p.dw, c);
    const int64_t pixels = int64_t(y.entries) * x.entries, run = (r - 1) * int64_t(x.entries) + c,
                  results = p.y_type == Int8Out::f32 ? 0 : staged_pitch(p.F) * plane_of(run),
                  in = staged_pitch(p.C);
    return {most(in * plane_of(pixels), p.res ? staged_pitch(p.F) * plane_of(run) : 0),
            in * plane_of(pixels), L.most_quads * plane_of(pixels) * kQuad, results,
            p.res ? results : 0};
  }
  int64_t band_bytes(int r, int c) const {
    if (L.tiles) return pixel_room(r, c).all();
    const int64_t h =
        least<int64_t>((r - 1) * int64_t(p.sh) + (L.KH - 1) * int64_t(p.dh) + 1, int64_t(L.KH) * r);
    const int64_t w =
        least<int64_t>((c - 1) * int64_t(p.sw) + (L.KW - 1) * int64_t(p.dw) + 1, int64_t(L.KW) * c);
    const int64_t patch = L.span ? int64_t(c) * L.KW * L.C : 0;
    return h * most(w * widest, patch);
  }
  size_t room() const {
    if (L.tiles) return size_t(pixel_room(rows, cols).all());
    if (!packs) return kSlack;
    return (size_t(ya.entries) * xa.entries * size_t(patches ? L.KW * L.C : widest) + 2 * kSlack -
            1) /
           kSlack * kSlack;
  }

  void look_at_blocks() {
    if (L.tiles) {
      packs = true;
      return;
    }
    direct = p.x_type == Byte::u8 && L.KH == 1 && L.KW == 1 && p.pt == 0 && p.pl == 0 &&
             L.reach <= L.C && (p.Ho - 1) * int64_t(p.sh) < p.H && (p.Wo - 1) * int64_t(p.sw) < p.W;
    for (int i = 0; i < L.blocks; ++i)
      if (!reads_directly(L.block[i])) {
        packs = true;
        widest = most<int64_t>(widest, L.order[L.block[i].order].pitch);
      }
  }

  void choose() {
    look_at_blocks();
    int r = 1, c = p.Wo;
    if (L.tiles) {
      while (c > kFewestPixels && band_bytes(1, c) > kInt8PixelBytes) c = ceil_div(c, 2);
      while (c == p.Wo && r < p.Ho && band_bytes(r + 1, c) <= kInt8PixelBytes) ++r;
    } else if (packs) {
      while (c > 1 && band_bytes(1, c) > int64_t(kWorkspaceBytes) / 2) c = ceil_div(c, 2);
      // One row of pixels may be a whole batch.
      if (p.Ho == 1 && L.KH == 1 && L.KW == 1)
        c = int(least<int64_t>(c, most<int64_t>(28, kInt8BandBytes / widest)));
      while (c == p.Wo && r < p.Ho && band_bytes(r + 1, c) <= kInt8BandBytes) ++r;
    } else {
      const int64_t pixels = most<int64_t>(28, kInt8BandBytes / L.C);
      c = int(least<int64_t>(p.Wo, pixels));
      r = int(most<int64_t>(1, least<int64_t>(p.Ho, pixels / c)));
    }
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
      if (more > 1 && in + out > (L.tiles ? kInt8PixelBytes : 2 * kInt8BandBytes)) break;
      pooled = more;
    }
    if (pooled == 0) return 0;
    int64_t nb = ceil_div(q.Ho, pooled);
    if (p.N * nb < p.threads) nb = least<int64_t>(q.Ho, nb * 2);
    pooled = int(ceil_div<int64_t>(q.Ho, nb));
    lay(int(least<int64_t>(p.Ho, (pooled - 1) * int64_t(q.sh) + q.KH)), p.Wo);
    return pooled;
  }

  // How many blocks from `first` on, before `end`, take turns row by row.
  int together(int first, int end) const {
    int64_t bytes = 0;
    int i = first;
    for (; i < end && i < first + kInt8Together; ++i) {
      const Int8Block& b = L.block[i];
      bytes += int64_t(b.quads + 2 * b.shuffles) * b.lanes * kQuad;
      if (i > first && (bytes > kInt8NearBytes || b.order != L.block[first].order)) break;
    }
    return i - first;
  }

  // Shares of the blocks, so that the last task to end does not keep the other threads long.
  int shares_for(int64_t units) const {
    if (p.threads <= 1 || L.tiles) return 1;
    if (units >= kInt8BandsPerThread * int64_t(p.threads) && together(0, L.blocks) == L.blocks)
      return 1;
    const int64_t wanted = kInt8TasksPerThread * int64_t(p.threads);
    return int(least<int64_t>(L.blocks, ceil_div(wanted, most<int64_t>(units, 1))));
  }

  const int32_t* offsets(OffsetCache* cache) const {
    OffsetKey key;
    memset(&key, 0, sizeof key);
    key.v[0] = xa.entries;
    key.v[1] = direct + 2 * patches + 4 * (L.tiles != 0);
    key.v[2] = ya.entries;
    for (int k = 0; k < L.KH; ++k) key.v[4 + k] = ya.start[k];
    for (int k = 0; k < L.KW && !patches; ++k) key.v[4 + kMaxKernel + k] = xa.start[k];
    if (const int* found = offsets_find(cache, key)) return found;
    int* off = static_cast<int*>(malloc(sizeof(int) * size_t(L.nsteps + 1)));
    if (!off) out_of_memory();
    const int64_t plane = plane_of(entries());
    for (int64_t s = 0; L.tiles && s < L.nsteps; ++s) {
      const Int8Step& step = L.steps[s];
      off[s] = int(kQuad *
                   (step.at * plane + int64_t(ya.start[step.ky]) * xa.entries + xa.start[step.kx]));
    }
    for (int i = 0; i < L.blocks; ++i) {
      const Int8Block& b = L.block[i];
      const bool here = reads_directly(b);
      for (int64_t s = b.step0; s < b.step0 + b.quads + b.shuffles; ++s) {
        const Int8Step& step = L.steps[s];
        const int64_t tap = patches ? 0 : xa.start[step.kx];
        off[s] = here ? step.at
                      : int(ya.start[step.ky] * xa.entries * pixel(b.order) + tap * pixel(b.order) +
                            step.at);
      }
    }
    return offsets_keep(cache, key, off, sizeof(int) * size_t(L.nsteps + 1));
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
