// SPDX-License-Identifier: Apache-2.0
// wgrad with pixels in vectors: bands of input and output gradient, both channel-planar; each slot
// adds its bands in a fixed order into its own partial sums, and the slots are added in a fixed
// order: two runs with the same number of threads agree bit by bit.
#pragma once
#include <cstdlib>
#include "fprop_pixels.h"
#include "micro_wgrad.h"
#include "pack_vectors.h"
#include "threads.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kWgradPixels = 512;  // of a band: the planes of one tile stay in the first cache

template <class S, class A> struct PixelsWgrad {
  const Lowered& L;
  Problem p, q;  // the layer; its output gradient as the input of a 1x1 layer
  Axis ya, xa, yb, xb;
  Planar gx, gy;
  int rows, cols, images;

  void lay(int r, int c, int m) {
    rows = r;
    cols = c;
    images = m;
    axis_phases(&ya, L.KH, p.sh, p.dh, r);
    if (ya.entries > L.KH * r) axis_copies(&ya, L.KH, p.sh, p.dh, r);
    axis_phases(&xa, L.KW, p.sw, p.dw, c);
    if (xa.entries > L.KW * c) axis_copies(&xa, L.KW, p.sw, p.dw, c);
    axis_copies(&yb, 1, 1, 1, r);
    axis_copies(&xb, 1, 1, 1, c);
    int longest = 0;
    for (int u = 0; u < xa.pieces; ++u) longest = most(longest, xa.piece[u].len);
    gx.pitch = gy.pitch = xa.pieces == 1 ? shared_gap_pitch(p, xa, c) : longest;
    gx.images = gy.images = m;
    gx.row = gy.row = int64_t(m) * gx.pitch;
    gx.spill = gy.spill =
        longest - c + 2 * VL<A>;  // whole vectors from the last tap: zeros, not a neighbour's Inf
    gx.piece = ya.entries * gx.row;
    gy.piece = r * gy.row;
    gx.plane = ceil_div<int64_t>(xa.pieces * gx.piece + gx.spill, VL<A>) * VL<A>;
    gy.plane = ceil_div<int64_t>(gy.piece + gy.spill, VL<A>) * VL<A>;
    if (gx.plane * sizeof(A) % 1024 == 0) gx.plane += 64 / int(sizeof(A));
    if (gy.plane * sizeof(A) % 1024 == 0) gy.plane += 64 / int(sizeof(A));
  }
  size_t transpose_bytes() const {
    return p.x.sc == 1 || q.x.sc == 1 ? size_t(most(gx.plane, gy.plane)) * VL<A> * sizeof(A) : 0;
  }
  size_t bytes() const {
    return size_t(gx.plane * L.nlive + gy.plane * L.F) * sizeof(A) + transpose_bytes();
  }

  void choose_band() {
    q = as_pointwise(p);
    int c = p.Wo, r = 1, m = 1;
    lay(1, c, 1);
    while (c > 1 && bytes() > (c > 32 ? kWgradBytes : kWorkspaceBytes - 1024))
      lay(1, c = ceil_div(c, 2), 1);
    while (c == p.Wo && r < p.Ho) {
      lay(r + 1, c, 1);
      if (bytes() > kWgradBytes || r * gx.pitch > kWgradPixels) break;
      ++r;
    }
    const int bands = ceil_div(p.Ho, r);
    r = ceil_div(p.Ho, bands);
    if (r == p.Ho && c == p.Wo)
      while (m < p.N && ceil_div<int64_t>(p.N, m + 1) >= p.threads) {
        lay(r, c, m + 1);
        if (bytes() > kWgradBytes || m * r * gx.pitch > kWgradPixels) break;
        ++m;
      }
    lay(r, c, m);
  }

  void band(const int* off, const A* x, const A* dy, int t0, int t1, int length, A* sums) {
    const int nvec = ceil_div(length, VL<A>);
    for (int t = t0; t < t1; ++t) {
      const PixelTile& tile = L.tiles[t];
      const A* g = dy + tile.filter0 * gy.plane;
      const int limit = kWgradColumns[tile.nf], parts = ceil_div(tile.ncols, limit);
      for (int i = 0, k = 0; i < parts; ++i) {
        const int nc = tile.ncols / parts + (i < tile.ncols % parts);
        wgrad_kernel_for<A>(tile.nf, nc)(g, gy.plane, x, off + tile.col0 + k, nvec,
                                         sums + tile.w0 + int64_t(k) * tile.nf);
        k += nc;
      }
    }
  }

  void run(OffsetCache* cache, S* dw, const int64_t* strides) {
    choose_band();
    const int* off = pixel_offsets<A>(L, cache, ya, xa, gx, false);
    const int64_t blocks = ceil_div<int64_t>(p.N, images), nb = ceil_div(p.Ho, rows),
                  strips = ceil_div(p.Wo, cols);
    const int64_t units = blocks * nb * strips;
    const int slots = int(least<int64_t>(units, p.threads)),
              shares = most(1, p.threads / most(slots, 1));
    const size_t x_room =
        (size_t(gx.plane) * L.nlive * sizeof(A) + 2 * HETCONV_VECTOR_BYTES + 63) / 64 * 64;
    const size_t y_room =
        (size_t(gy.plane) * L.F * sizeof(A) + 2 * HETCONV_VECTOR_BYTES + 63) / 64 * 64;
    const int64_t span = ceil_div<int64_t>(L.packed, VL<A>) * VL<A> + VL<A>;
    A* partial = static_cast<A*>(calloc(size_t(span) * most(slots, 1), sizeof(A)));
    if (!partial) out_of_memory();
    each_in_parallel(slots * shares, slots * shares, [&](int64_t worker) {
      const int slot = int(worker / shares), share = int(worker % shares);
      char* room = static_cast<char*>(workspace(x_room + y_room + transpose_bytes()));
      A* x = reinterpret_cast<A*>(room);
      A* dy = reinterpret_cast<A*>(room + x_room);
      A* scratch = reinterpret_cast<A*>(room + x_room + y_room);
      const int t0 = int(int64_t(L.count) * share / shares),
                t1 = int(int64_t(L.count) * (share + 1) / shares);
      for (int64_t unit = slot; unit < units; unit += slots) {
        const int64_t n0 = unit / (nb * strips) * images;
        const int oy = int(unit / strips % nb) * rows, ox = int(unit % strips) * cols;
        const int nr = least(rows, p.Ho - oy), nc = least(cols, p.Wo - ox),
                  nm = int(least<int64_t>(images, p.N - n0));
        pack_planes<S, A>(p, reinterpret_cast<const S*>(p.x.data), L.live, L.nlive, L.plane, ya, xa,
                          gx, n0, nm, oy, ox, nr, nc, scratch, x);
        pack_planes<S, A>(q, reinterpret_cast<const S*>(q.x.data), L.filters, L.F, L.ascending, yb,
                          xb, gy, n0, nm, oy, ox, nr, nc, scratch, dy);
        band(off, x, dy, t0, t1, nr * images * gx.pitch, partial + slot * span);
      }
    });
    each_in_parallel(L.count, L.packed > (1 << 15) ? p.threads : 1, [&](int64_t t) {
      const PixelTile& tile = L.tiles[t];
      for (int k = 0; k < tile.ncols; ++k) {
        const Column& c = L.columns[tile.col0 + k];
        for (int i = 0; i < tile.nf; ++i) {
          A sum = 0;
          for (int s = 0; s < slots; ++s)
            sum += partial[s * span + tile.w0 + int64_t(k) * tile.nf + i];
          dw[L.filters[tile.filter0 + i] * strides[0] + c.channel * strides[1] + c.ky * strides[2] +
             c.kx * strides[3]] = Narrow<S>::of(sum);
        }
      }
    });
    free(partial);
  }
};

template <class S, class A>
static void wgrad_pixels(const Lowered& L, OffsetCache* cache, const Problem& p, void* dw,
                         const int64_t* strides) {
  PixelsWgrad<S, A> g{L, p, p, {}, {}, {}, {}, {}, {}, 0, 0, 0};
  g.run(cache, static_cast<S*>(dw), strides);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
