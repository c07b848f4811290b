// SPDX-License-Identifier: Apache-2.0
// wgrad with channels in vectors: bands of input and output gradient, both by vectors of channels.
// Few weights: every slot adds its bands into sums of its own, and the slots are added in a fixed
// order. Many weights: the tiles are shared out, and each share goes through all bands. Both ways
// two runs with the same number of threads agree bit by bit.
#pragma once
#include <cstdlib>
#include "channels.h"
#include "micro_wgrad_channels.h"
#include "pack_vectors.h"
#include "threads.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int kSumPixels = 256;  // that are added in registers before memory adds them up

// What ChannelsWgrad multiplies: images as they come, one number a lane.
template <class S, class A> struct OneImage {
  using Storage = S;
  using Product = OneProduct<A>;
  static const S* images(const View& v, int64_t) { return reinterpret_cast<const S*>(v.data); }
  static int64_t count(int64_t N) { return N; }
};

template <class S, class A, class K = OneImage<S, A>> struct ChannelsWgrad {
  using In = typename K::Storage;
  const ChannelLowered& L;
  Problem p, q;  // the layer; its output gradient as the input of a 1x1 layer
  Axis ya, xa, yb, xb;
  Planar gx, gy;  // planes in entries
  int rows, cols, images;
  int64_t count;            // images of the call; p.N counts what K reads as one
  bool x_planar, y_planar;  // through a planar band, which is then transposed unit by unit

  static void lay_axis(Axis* a, int taps, int s, int d, int count) {
    axis_shared(a, taps, s, d, count);
    if (a->entries > taps * count) axis_copies(a, taps, s, d, count);
  }
  static void lay_plane(Planar* g, const Axis& y, const Axis& x, int m) {
    int longest = 0;
    for (int u = 0; u < x.pieces; ++u) longest = most(longest, x.piece[u].len);
    g->images = m;
    g->pitch = longest;
    g->spill = 0;
    g->row = int64_t(m) * longest;
    g->piece = y.entries * g->row;
    g->plane = ceil_div<int64_t>(x.pieces * g->piece, VL<A>) * VL<A>;
    if (g->plane * VL<A> * sizeof(A) % 4096 == 0) g->plane += VL<A>;
  }
  void lay(int r, int c, int m) {
    rows = r;
    cols = c;
    images = m;
    lay_axis(&ya, L.KH, p.sh, p.dh, r);
    lay_axis(&xa, L.KW, p.sw, p.dw, c);
    axis_copies(&yb, 1, 1, 1, r);
    axis_copies(&xb, 1, 1, 1, c);
    lay_plane(&gx, ya, xa, m);
    lay_plane(&gy, yb, xb, m);
  }
  size_t x_bytes() const { return size_t(gx.plane) * L.most_x * VL<A> * sizeof(A); }
  size_t y_bytes() const { return size_t(gy.plane) * L.most_y * VL<A> * sizeof(A); }
  size_t x_planes() const { return x_planar ? size_t(gx.plane) * L.nlive * sizeof(A) : 0; }
  size_t y_planes() const { return y_planar ? size_t(gy.plane) * L.F * sizeof(A) : 0; }
  size_t bytes() const { return x_bytes() + y_bytes() + x_planes() + y_planes(); }

  // Too many for every thread to have its own.
  bool many_sums() const { return size_t(L.sums) * sizeof(A) > kSumsBytes; }

  void choose_band() {
    count = p.N;
    p.N = K::count(count);
    q = as_pointwise(p);
    x_planar = L.scattered_x || p.x.sc != 1;
    y_planar = L.scattered_y || q.x.sc != 1;
    if (p.N == 0 || p.Ho == 0 || p.Wo == 0) return lay(1, 1, 1);
    const bool many = many_sums();
    int c = p.Wo, r = 1, m = 1;
    lay(1, c, 1);
    while (c > 1 && bytes() > (c > 16 ? kChannelBandBytes : kWorkspaceBytes - 1024))
      lay(1, c = ceil_div(c, 2), 1);
    while (c == p.Wo && r < p.Ho) {
      lay(r + 1, c, 1);
      if (bytes() > kChannelBandBytes) break;
      ++r;
    }
    r = ceil_div(p.Ho, ceil_div(p.Ho, r));
    if (r == p.Ho && c == p.Wo)
      while (m < p.N && m * r * c < 1024) {
        lay(r, c, m + 1);
        if (bytes() > kChannelBandBytes) break;
        ++m;
      }
    m = int(ceil_div<int64_t>(p.N, ceil_div<int64_t>(p.N, m)));
    // As many bands for every thread.
    const int64_t blocks = ceil_div<int64_t>(p.N, m), bands = ceil_div(p.Ho, r);
    if (!many && blocks * bands < 4 * int64_t(p.threads))
      for (int64_t b = bands; b <= most<int64_t>(bands, least<int64_t>(p.Ho, 4 * bands)); ++b)
        if (blocks * b % p.threads == 0) {
          r = int(ceil_div<int64_t>(p.Ho, b));
          break;
        }
    lay(r, c, m);
  }

  ptrdiff_t* window_offsets() const {
    ptrdiff_t* off = static_cast<ptrdiff_t*>(malloc(sizeof(ptrdiff_t) * size_t(L.windows + 1)));
    if (!off) out_of_memory();
    for (int u = 0; u < L.units; ++u)
      for (int t = L.unit[u].tile0; t < L.unit[u].tile0 + L.unit[u].tiles; ++t)
        for (int w = L.tile[t].window0; w < L.tile[t].window0 + L.tile[t].nv; ++w) {
          const ChannelWindow& k = L.window[w];
          const int piece = xa.piece_of[k.kx];
          off[w] = (piece * gx.piece + ya.start[k.ky] * gx.row + xa.start[k.kx] -
                    xa.piece[piece].e0 + (k.vector - L.unit[u].x0) * gx.plane) *
                   VL<A>;
        }
    return off;
  }

  // The first tile of a share: equal multiply-adds.
  int boundary(int64_t share, int64_t shares) const {
    const int64_t want = L.work[L.tiles] / shares * share;
    int t = 0;
    if (share == shares) return L.tiles;
    for (int step = 1 << 30; step > 0; step /= 2)
      if (t + step <= L.tiles && L.work[t + step] <= want) t += step;
    return t;
  }

  struct Output {
    S* dw;
    const int64_t* strides;
  };

  // A tile's sums, those of all slots, to the gradient.
  void emit(const ChannelTile& t, const A* sums, int slots, const Output& out) const {
    S* dw = out.dw;
    const int64_t* strides = out.strides;
    for (int i = 0; i < t.nf; ++i)
      for (int j = 0; j < t.nv; ++j) {
        const ChannelWindow& k = L.window[t.window0 + j];
        Vec<A> sum = {};
        for (int s = 0; s < slots; ++s)
          sum += load<A>(sums + s * L.sums + t.sum0 + (int64_t(i) * t.nv + j) * VL<A>);
        const int64_t at = k.ky * strides[2] + k.kx * strides[3];
        const int* channels = L.channels + int64_t(k.vector) * VL<A>;
        const int* filters = L.filters + int64_t(t.vector) * VL<A>;
        if (t.whole) {  // no dead weight but in idle lanes
          S* to = dw + filters[t.first + i] * strides[0] + at;
          const int run = L.channel_run[k.vector];
          if (strides[1] == 1 && run == VL<A>)
            write<S, A>(to + channels[0], sum);
          else if (strides[1] == 1 && run > 0)
            write_n<S, A>(to + channels[0], sum, run);
          else {
            A lane[VL<A>];
            store<A>(lane, sum);
            for (int l = 0; l < VL<A> && channels[l] >= 0; ++l)
              to[channels[l] * strides[1]] = Narrow<S>::of(lane[l]);
          }
          continue;
        }
        const auto* perm =
            reinterpret_cast<const typename Lane<A>::index*>(L.perms) + t.perm0 + i * VL<A>;
        const uint8_t* taken = L.taken + t.perm0 + i * VL<A>;
        for (int l = 0; l < VL<A>; ++l) {
          if (channels[l] < 0 || (t.permuted && !taken[l])) continue;
          const int f = filters[t.permuted ? int(perm[l]) : t.first + i];
          if (L.mask[((int64_t(f) * L.C + channels[l]) * L.KH + k.ky) * L.KW + k.kx])
            dw[f * strides[0] + channels[l] * strides[1] + at] = Narrow<S>::of(sum[l]);
        }
      }
  }

  void run(const Output& out) {
    choose_band();
    ptrdiff_t* off = window_offsets();
    const int64_t blocks = ceil_div<int64_t>(p.N, images), nb = ceil_div(p.Ho, rows),
                  strips = ceil_div(p.Wo, cols);
    const int64_t units = blocks * nb * strips;
    const int slots =
                  int(many_sums() ? least<int64_t>(units, 1) : least<int64_t>(units, p.threads)),
              shares = most(1, p.threads / most(slots, 1));
    const size_t slack = 64;
    const size_t x_room = (x_bytes() + slack + 63) / 64 * 64,
                 y_room = (y_bytes() + slack + 63) / 64 * 64, xp_room = (x_planes() + 63) / 64 * 64,
                 yp_room = (y_planes() + 63) / 64 * 64;
    A* partial = static_cast<A*>(malloc(size_t(L.sums + VL<A>) * most(slots, 1) * sizeof(A)));
    if (!partial) out_of_memory();
    each_in_parallel(slots * shares, slots * shares, [&](int64_t worker) {
      const int slot = int(worker / shares), share = int(worker % shares);
      const int t0 = boundary(share, shares), t1 = boundary(share + 1, shares);
      char* room = static_cast<char*>(workspace(x_room + y_room + xp_room + yp_room));
      A* x = reinterpret_cast<A*>(room);
      A* dy = reinterpret_cast<A*>(room + x_room);
      A* x_plane = reinterpret_cast<A*>(room + x_room + y_room);
      A* y_plane = reinterpret_cast<A*>(room + x_room + y_room + xp_room);
      for (int64_t unit = slot; unit < units; unit += slots) {
        const int64_t n0 = unit / (nb * strips) * images;
        const int oy = int(unit / strips % nb) * rows, ox = int(unit % strips) * cols;
        const int nr = least(rows, p.Ho - oy), nc = least(cols, p.Wo - ox),
                  nm = int(least<int64_t>(images, p.N - n0));
        if (t1 > t0) {
          const Images<In> xs = K::images(p.x, count), ys = K::images(q.x, count);
          if (x_planar)
            pack_planes<In, A>(p, xs, L.live, L.nlive, L.plane, ya, xa, gx, n0, nm, oy, ox, nr, nc,
                               x, x_plane);
          if (y_planar)
            pack_planes<In, A>(q, ys, L.identity, L.F, L.identity, yb, xb, gy, n0, nm, oy, ox, nr,
                               nc, dy, y_plane);
          for (int u = 0; u < L.units; ++u)
            if (L.unit[u].tile0 < t1 && L.unit[u].tile0 + L.unit[u].tiles > t0)
              band(L.unit[u], most(t0, L.unit[u].tile0),
                   least(t1, L.unit[u].tile0 + L.unit[u].tiles), off, n0, nm, oy, ox, nr, nc,
                   x_plane, y_plane, x, dy, partial + slot * L.sums, unit == slot,
                   slots == 1 && unit == units - 1 ? &out : nullptr);
        }
      }
    });
    if (slots != 1) {
      each_in_parallel(L.tiles, L.sums > (1 << 15) ? p.threads : 1,
                       [&](int64_t t) { emit(L.tile[t], partial, slots, out); });
    }
    free(partial);
    free(off);
  }

  // Tiles [t0, t1) of one unit over one band. out: where finished sums go, or null.
  void band(const ChannelUnit& u, int t0, int t1, const ptrdiff_t* off, int64_t n0, int nm, int oy,
            int ox, int nr, int nc, const A* x_plane, const A* y_plane, A* x, A* dy, A* sums,
            bool first, const Output* out) const {
    const int v0 = L.tile[t0].vector, v1 = L.tile[t1 - 1].vector + 1;
    if (x_planar)
      transpose_planes<A>(x_plane, L.planes + int64_t(u.x0) * VL<A>, u.nx, gx.plane, x);
    else
      pack_vectors<In, A>(p, K::images(p.x, count), L.channels + int64_t(u.x0) * VL<A>,
                          L.channel_run + u.x0, u.nx, ya, xa, gx, n0, nm, oy, ox, nr, nc, x);
    if (y_planar)
      transpose_planes<A>(y_plane, L.filters + int64_t(v0) * VL<A>, v1 - v0, gy.plane, dy);
    else
      pack_vectors<In, A>(q, K::images(q.x, count), L.filters + int64_t(v0) * VL<A>,
                          L.filter_run + v0, v1 - v0, yb, xb, gy, n0, nm, oy, ox, nr, nc, dy);
    PixelSpan s{nr,
                nm,
                nc,
                ya.step * gx.row * VL<A>,
                gx.pitch * VL<A>,
                xa.step * VL<A>,
                gy.row * VL<A>,
                gy.pitch * VL<A>};
    if (ya.step == 1 && nm == images) {  // the rows of all images follow one another
      s.images = nr * nm;
      s.rows = 1;
    }
    // A long chain of sums in one register would lose more than PyTorch's own order does.
    PixelSpan block = s, part = s;
    block.cols = least(s.cols, kSumPixels);
    block.images = least(s.images, most(1, kSumPixels / block.cols));
    block.rows = least(s.rows, most(1, kSumPixels / (block.cols * block.images)));
    const A* perms = static_cast<const A*>(L.perms);
    for (int t = t0; t < t1; ++t) {
      const ChannelTile& k = L.tile[t];
      const ChannelsKernel<A> kernel =
          channels_kernel_for<A, typename K::Product>(k.permuted, k.nf, k.nv);
      const A* g = dy + (k.vector - v0) * gy.plane * VL<A> + k.first;
      bool fresh = first;
      for (int r = 0; r < s.rows; r += block.rows)
        for (int m = 0; m < s.images; m += block.images)
          for (int c = 0; c < s.cols; c += block.cols, fresh = false) {
            part.rows = least(block.rows, s.rows - r);
            part.images = least(block.images, s.images - m);
            part.cols = least(block.cols, s.cols - c);
            kernel(g + r * s.dy_row + m * s.dy_image + c * VL<A>,
                   x + r * s.x_row + m * s.x_image + c * s.x_pixel, off + k.window0, part,
                   perms + k.perm0, sums + k.sum0, fresh);
          }
      if (out) emit(k, sums, 1, *out);
    }
  }
};

template <class S, class A, class K = OneImage<S, A>>
static void wgrad_channels(const ChannelLowered& L, const Problem& p, void* dw,
                           const int64_t* strides) {
  ChannelsWgrad<S, A, K> g{L, p, p, {}, {}, {}, {}, {}, {}, 0, 0, 0, 0, false, false};
  g.run({static_cast<S*>(dw), strides});
}

}  // namespace HETCONV_NS
}  // namespace hetconv
