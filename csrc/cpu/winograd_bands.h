// SPDX-License-Identifier: Apache-2.0
// The bands of Winograd's forms: how many rows, columns and images go together, where a task keeps
// them, and how they come there.
#pragma once
#include <cmath>
#include "fprop_filters.h"
#include "pack_phases.h"
#include "winograd_outputs.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr size_t kTransformedBytes = 384u << 10;  // of a band's inputs
constexpr int kEnoughTiles = 5 * kMaxPixels;      // for weights that come from far

// K: what is multiplied, as of FiltersFprop; a band, and its transformed inputs, are of K::Band.
template <class S, class A, int M, class K> struct WinogradBands : FiltersFprop<S, A, K> {
  using Base = FiltersFprop<S, A, K>;
  using Band = typename K::Band;
  using Base::Cb;
  using Base::cols;
  using Base::in_pixel;
  using Base::in_row;
  using Base::L;
  using Base::p;
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

  WinogradBands(const Lowered& lowered, const Problem& problem, const A* weights)
      : Base{lowered, problem, weights}, W(*lowered.winograd) {}

  static int in_tiles(int n) { return ceil_div(n, M); }
  static int whole(int n) { return in_tiles(n) * M; }
  int tiles_of(int r, int c) const { return in_tiles(r) * in_tiles(c); }
  size_t inputs_bytes(int tiles) const {
    return size_t(position_pitch<Band>(tiles, W.widest * VL<A>)) * kPositions * sizeof(Band);
  }
  bool transposes() const { return p.y.sc != 1 && p.y.sw == 1; }
  size_t outputs_bytes(int r, int c) const {
    const size_t pixels = size_t(ceil_div(images * r * c, VL<A>)) * VL<A>;
    return pixels * 2 * VL<A> * (transposes() ? 2 : 1) * sizeof(A);
  }
  size_t image_bytes(int r, int c) const {
    return size_t(whole(r) + kBeyond) * size_t(whole(c) + kBeyond) * size_t(Cb) * sizeof(Band);
  }
  bool fits(int m, int r, int c) const {
    const int tiles = m * tiles_of(r, c);
    return inputs_bytes(tiles) <= kTransformedBytes && m * image_bytes(r, c) <= kImageBlockBytes;
  }

  void choose_band() {
    Cb = ceil_div(W.channels, VL<Band>) * VL<Band>;
    if (int64_t(Cb) * sizeof(Band) % 1024 == 0) Cb += VL<Band>;
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

  // Where tasks keep what they compute from.
  struct Place {
    Band *band, *inputs;
    A *sums, *scratch;
  };

  size_t room_for_image() const {
    return (image_bytes(rows, cols) + VL<Band> * sizeof(Band) + 63) / 64 * 64;
  }
  int most_tiles() const { return images * tiles_of(rows, cols); }
  size_t room() const {
    return images * room_for_image() + inputs_bytes(most_tiles()) + kSumsBytes +
           outputs_bytes(rows, cols) + 4 * HETCONV_VECTOR_BYTES;
  }
  Place lay_out(char* memory) const {
    Place at;
    at.band = reinterpret_cast<Band*>(memory);
    at.inputs = reinterpret_cast<Band*>(memory += images * room_for_image());
    at.sums = reinterpret_cast<A*>(memory += inputs_bytes(most_tiles()));
    at.scratch = reinterpret_cast<A*>(memory + kSumsBytes);
    return at;
  }
  const Band* image(const Place& at, int m) const {
    return at.band + m * (room_for_image() / sizeof(Band));
  }

  void pack(const TileBlock& b, const Place& at) const {
    for (int m = 0; m < b.images; ++m) {
      const S* x = reinterpret_cast<const S*>(p.x.data) + (b.n + m) * p.x.sn;
      Band* band = const_cast<Band*>(image(at, m));
      if constexpr (kPhases == 1)
        pack_channels_last<S, Band>(p, x, ya, xa, b.oy, b.ox, M * b.tr, M * b.tc, Cb, band);
      else
        pack_phases<S, Band>(p, x, b.oy, b.ox, M * b.tr + kBeyond, M * b.tc + kBeyond, Cb, in_row,
                             band);
    }
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
};

}  // namespace HETCONV_NS
}  // namespace hetconv
