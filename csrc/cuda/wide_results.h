// SPDX-License-Identifier: Apache-2.0
// Results of the wide kernel on their way from registers to y, and the residual on its way in:
// through a staging buffer in shared memory, so that device memory sees 16-byte accesses.
#pragma once
#include "epilogue.h"
#include "halo.h"
#include "wide_work.h"

namespace hetconv::cuda::wide {

// The rows and columns of a tile that are in y.
struct Pixels {
  int64_t corner;  // of the tile's first image in y, in elements
  int64_t image_step;
  int rows_left, cols_left, image_rows, images_left, step_h, step_w;
  Divider by_image;

  __device__ Pixels(const Wide& p, const Item& item, int tile_rows)
      : image_step(p.y_n), image_rows(load_table(item.table + kImagePitch)), by_image(image_rows) {
    const int32_t* table = item.table;
    const int row = item.row * tile_rows, images = load_table(table + kImages);
    const int store_h = load_table(table + kStoreH), store_w = load_table(table + kStoreW);
    images_left = p.batch - item.image < images ? p.batch - item.image : images;
    rows_left = item.real ? load_table(table + kPixelsH) - row : 0;
    cols_left = load_table(table + kPixelsW) - item.col;
    step_h = store_h * p.y_h;
    step_w = store_w * p.y_w;
    corner = item.image * p.y_n + int64_t(row * store_h + load_table(table + kFirstH)) * p.y_h +
             int64_t(item.col * store_w + load_table(table + kFirstW)) * p.y_w;
  }
  // Tile row i's first pixel in y, in elements; negative if the row is not in y.
  __device__ int64_t place(int i) const {
    const int image = int(by_image(i)), row = i - image * image_rows;
    if (image >= images_left || row >= rows_left) return -1;
    return corner + image * image_step + row * step_h;
  }
};

// Results of one item on their way from a warpgroup's registers to y, 32 pixels at a time.
template <class T, int kPixels, class Activation> struct Results {
  static constexpr int kTiles = kPixels / kColumns;
  const Wide& p;
  uint32_t staged;  // two buffers of this warpgroup
  int group, thread;

  __device__ void barrier() const { barrier_of(1 + group, kGroupThreads); }

  __device__ void send(const float (&acc)[kPixels / 2], const Item& item) const {
    const int lane = thread % 32, warp = thread / 32;
    const int32_t* rows = p.rows + (item.pair * kWarpgroups + group) * kRuns;
    const Pixels pixels(p, item, kTiles);
    const Activation activate(p.act);

    // In fragments, this lane has two filters.
    float scale[2] = {1.0f, 1.0f}, shift[2] = {0.0f, 0.0f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int run = load_table(rows + warp * 2 + h);
      const int filter = run < 0 ? -1 : run + lane / 4;
      if (filter >= 0 && p.scale) scale[h] = p.scale[filter];
      if (filter >= 0 && p.shift) shift[h] = p.shift[filter];
    }
    const uint32_t cell =
        staged + (lane / 16 * 8 + lane % 8) * kStagedPitch + warp * 32 + lane / 8 % 2 * 16;

    // As 16-byte pieces, this thread has one run of eight filters, of pixels in one column.
    const int run = load_table(rows + thread % kRuns), column = thread / kRuns % kColumns;
    const bool mine = run >= 0 && column < pixels.cols_left;
    const int64_t along = int64_t(column) * pixels.step_w + run;
    const uint32_t piece = staged + thread / kRuns * kStagedPitch + thread % kRuns * 16;
    constexpr int kHalf = kStagedPixels / 2 * kStagedPitch;  // from the first to the second piece
    auto place = [&](int part, int second) {
      const int64_t at = pixels.place(part * 4 + second * 2 + thread / (kRuns * kColumns));
      return mine && at >= 0 ? at + along : -1;
    };
    const uint16_t* residual = static_cast<const uint16_t*>(p.residual);
    Quad old[2] = {};
    auto fetch = [&](int part) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int64_t at = place(part, second);
        old[second] = {};
        if (at >= 0) old[second] = load_table128(residual + at);
      }
    };
    if (residual) fetch(0);
    barrier();  // all have written out what was here before

#pragma unroll
    for (int part = 0; part < kTiles / 4; ++part) {
      const int buffer = part % 2 * kStagedBytes;
      if (residual) {
#pragma unroll
        for (int second = 0; second < 2; ++second)
          store_shared128(piece + buffer + second * kHalf, old[second]);
        if (part + 1 < kTiles / 4) fetch(part + 1);
        barrier();
      }
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        Quad made = {};
        const uint32_t at = cell + buffer + second * kHalf;
        if (residual) made = load_matrices_transposed(at);
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // matrices: filters by pixels of one tile row
          const int h = m % 2, row = part * 4 + second * 2 + m / 2;
          float v[2] = {acc[row * 4 + h * 2], acc[row * 4 + h * 2 + 1]};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[i] = v[i] * scale[h] + shift[h];
            if (residual) v[i] += widen<T>(i ? made.v[m] >> 16 : made.v[m] & 0xFFFF);
            v[i] = activate(v[i]);
          }
          made.v[m] = narrow_pair<T>(v[0], v[1]);
        }
        store_matrices_transposed(at, made);
      }
      barrier();
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int64_t at = place(part, second);
        if (at >= 0)
          store128(static_cast<uint16_t*>(p.y) + at,
                   load_shared128(piece + buffer + second * kHalf));
      }
    }
  }
};

}  // namespace hetconv::cuda::wide
