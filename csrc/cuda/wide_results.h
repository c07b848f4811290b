// SPDX-License-Identifier: Apache-2.0
// Results of the wide kernel on their way from registers to y, and the residual on its way in:
// through a staging buffer in shared memory, so that device memory sees 16-byte accesses.
#pragma once
#include "epilogue.h"
#include "wide_work.h"

namespace hetconv::cuda::wide {

// The rows and columns of a tile that are in y; of flattened rows, of the whole line.
template <bool kFlat> struct Pixels {
  int64_t corner;  // of the tile's first image in y, in elements
  int64_t image_step;
  int rows_left, cols_left, image_rows, images_left, step_h, step_w;

  __device__ Pixels(const Wide& p, const Item& item, int tile_rows)
      : image_step(p.y_n), image_rows(load_table(item.table + kImagePitch)) {
    const int32_t* table = item.table;
    const int row = kFlat ? 0 : item.row * tile_rows, images = load_table(table + kImages);
    const int store_h = load_table(table + kStoreH), store_w = load_table(table + kStoreW);
    images_left = p.batch - item.image < images ? p.batch - item.image : images;
    rows_left = item.real ? load_table(table + kPixelsH) - row : 0;
    cols_left = load_table(table + kPixelsW) - item.col;
    step_h = store_h * p.y_h;
    step_w = store_w * p.y_w;
    corner = item.image * p.y_n + int64_t(row * store_h + load_table(table + kFirstH)) * p.y_h +
             int64_t(item.col * store_w + load_table(table + kFirstW)) * p.y_w;
  }
};

// Rows of a tile from a thread's piece to its next one.
constexpr int kEvery = 2;

// Where a thread's pieces lie in y, or in the residual: eight filters of one column of pixels, in
// every kEvery-th row of a tile. Nothing is divided on the way.
struct Walk {
  int64_t at, turn, wrap;  // bytes: of the piece, to the next one, and if that is of another image
  int row, image, row_turn, image_turn, image_rows, rows_left, images_left;

  __device__ Walk(const Wide&, const Pixels<false>& pixels, int, int first, int column, int run)
      : image_rows(pixels.image_rows), rows_left(pixels.rows_left) {
    image = first / image_rows;
    row = first - image * image_rows;
    image_turn = kEvery / image_rows;
    row_turn = kEvery - image_turn * image_rows;
    turn = (image_turn * pixels.image_step + row_turn * pixels.step_h) * 2;
    wrap = (pixels.image_step - int64_t(image_rows) * pixels.step_h) * 2;
    at = (pixels.corner + image * pixels.image_step + int64_t(row) * pixels.step_h +
          int64_t(column) * pixels.step_w + run) *
         2;
    // Who has no filters, or no column, has no piece anywhere.
    images_left = run >= 0 && column < pixels.cols_left ? pixels.images_left : 0;
  }
  __device__ bool inside() const { return image < images_left && row < rows_left; }
  __device__ void next() {
    row += row_turn;
    image += image_turn;
    at += turn;
    if (row >= image_rows) {
      row -= image_rows;
      ++image;
      at += wrap;
    }
  }
};

// The same of flattened rows, 8 * kEvery places from a piece to the next.
struct FlatWalk {
  static constexpr int kAhead = kEvery * kColumns;
  int64_t at, image_wrap;  // bytes: of the piece, and if the next one is of another image
  int turn, row_wrap;      // to the next one, and if that is of another row
  int col, row, image, col_turn, row_turn, flat_pitch, image_rows, cols, rows, images;

  __device__ FlatWalk(const Wide& p, const Pixels<true>& pixels, int place, int first, int column,
                      int run)
      : flat_pitch(p.flat_pitch),
        image_rows(pixels.image_rows),
        cols(pixels.cols_left),
        rows(pixels.rows_left) {
    place += first * kColumns + column;
    const int lines = place / flat_pitch;
    image = lines / image_rows;
    row = lines - image * image_rows;
    col = place - lines * flat_pitch;
    row_turn = kAhead / flat_pitch;
    col_turn = kAhead - row_turn * flat_pitch;
    turn = (row_turn * pixels.step_h + col_turn * pixels.step_w) * 2;
    row_wrap = (pixels.step_h - flat_pitch * pixels.step_w) * 2;
    image_wrap = (pixels.image_step - int64_t(image_rows) * pixels.step_h) * 2;
    at = (pixels.corner + image * pixels.image_step + int64_t(row) * pixels.step_h +
          int64_t(col) * pixels.step_w + run) *
         2;
    images = run >= 0 ? pixels.images_left : 0;  // who has no filters has no piece anywhere
  }
  __device__ bool inside() const { return image < images && row < rows && col < cols; }
  __device__ void next() {
    col += col_turn;
    row += row_turn;
    at += turn;
    if (col >= flat_pitch) {
      col -= flat_pitch;
      ++row;
      at += row_wrap;
    }
    if (row >= image_rows) {
      row -= image_rows;
      ++image;
      at += image_wrap;
    }
  }
};

template <bool kFlat> struct WalkOf {
  using Type = Walk;
};
template <> struct WalkOf<true> {
  using Type = FlatWalk;
};

// Results of one item on their way from a warpgroup's registers to y, 32 pixels at a time.
template <class T, int kPixels, class Activation, bool kFlat> struct Results {
  static constexpr int kTiles = kPixels / kColumns;
  static constexpr int kPieces = kTiles / kEvery;  // of a thread, two of a part
  static_assert(kTiles % kEvery == 0, "no piece has half of its rows");
  const Wide& p;
  uint32_t staged;  // two buffers of this warpgroup
  int group, thread;

  __device__ void barrier() const { barrier_of(1 + group, kGroupThreads); }

  __device__ void send(const float (&acc)[kPixels / 2], const Item& item) const {
    if (p.residual)
      send_with<true>(acc, item);
    else
      send_with<false>(acc, item);
  }

  template <bool kResidual>
  __device__ void send_with(const float (&acc)[kPixels / 2], const Item& item) const {
    const int lane = thread % 32, warp = thread / 32;
    const int32_t* rows = p.rows + (item.pair * kWarpgroups + group) * kRuns;
    const Pixels<kFlat> pixels(p, item, kTiles);
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
    const int run = load_table(rows + thread % kRuns);
    typename WalkOf<kFlat>::Type to(p, pixels, item.row * kPixels, thread / (kRuns * kColumns),
                                    thread / kRuns % kColumns, run),
        from = to;
    const uint32_t piece = staged + thread / kRuns * kStagedPitch + thread % kRuns * 16;
    constexpr int kHalf = kStagedPixels / 2 * kStagedPitch;  // from the first to the second piece
    Quad old[2] = {};
    auto fetch = [&](int part) {
#pragma unroll
      for (int second = 0; second < 2; ++second, from.next()) {
        old[second] = {};
        if (part * 2 + second < kPieces && from.inside())
          old[second] = load_table128(static_cast<const char*>(p.residual) + from.at);
      }
    };
    if (kResidual) fetch(0);
    barrier();  // all have written out what was here before

#pragma unroll
    for (int part = 0; part * 2 < kPieces; ++part) {
      const int buffer = part % 2 * kStagedBytes;
      if (kResidual) {
#pragma unroll
        for (int second = 0; second < 2; ++second)
          store_shared128(piece + buffer + second * kHalf, old[second]);
        if (part * 2 + 2 < kPieces) fetch(part + 1);
        barrier();
      }
#pragma unroll
      for (int second = 0; second < 2 && part * 2 + second < kPieces; ++second) {
        Quad made = {};
        const uint32_t at = cell + buffer + second * kHalf;
        if (kResidual) made = load_matrices_transposed(at);
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // matrices: filters by pixels of one tile row
          const int h = m % 2, row = part * 4 + second * 2 + m / 2;
          float v[2] = {acc[row * 4 + h * 2], acc[row * 4 + h * 2 + 1]};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[i] = v[i] * scale[h] + shift[h];
            if (kResidual) v[i] += widen<T>(i ? made.v[m] >> 16 : made.v[m] & 0xFFFF);
          }
          made.v[m] = activate.template pair<T>(v[0], v[1]);
        }
        store_matrices_transposed(at, made);
      }
      barrier();
#pragma unroll
      for (int second = 0; second < 2 && part * 2 + second < kPieces; ++second, to.next())
        if (to.inside())
          store128(static_cast<char*>(p.y) + to.at,
                   load_shared128(piece + buffer + second * kHalf));
    }
  }
};

}  // namespace hetconv::cuda::wide
