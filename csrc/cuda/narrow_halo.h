// SPDX-License-Identifier: Apache-2.0
// Bringing a tile of pixels with its halo to shared memory, and gathering channels there.
#pragma once
#include "narrow.h"
#include "narrow_operands.h"
#include "ptx.h"

namespace hetconv::cuda {

// Division of small numbers (n * d < 2^32) by one that stays.
struct Divider {
  uint32_t by, factor;
  __device__ explicit Divider(uint32_t d) : by(d), factor(d == 1 ? 0 : 0xFFFFFFFFu / d + 1) {}
  __device__ uint32_t operator()(uint32_t n) const {
    return by == 1 ? n : multiply_high(n, factor);
  }
};

// Deals the cells of a table to the block's threads, neighbours along a line, and each thread cells
// of one column: `make(column)` is called for it once, and what that returns for each line.
template <class Make> __device__ __forceinline__ void each_cell(int lines, int columns, Make make) {
  const int threads = blockDim.x, lanes = columns < threads ? columns : threads;
  const int step = threads / lanes, own = int(threadIdx.x) / lanes;
  if (own >= step) return;
  for (int column = int(threadIdx.x) - own * lanes; column < columns; column += lanes) {
    const auto at = make(column);
#pragma unroll 2
    for (int line = own; line < lines; line += step) at(line);
  }
}

// Halo tiles of one operand. In shared memory a halo row is a line of `line` pixels, its columns by
// residue of load_w, `split` of each, so that pixels that adjacent outputs read are adjacent.
struct Halo {
  int rows, cols, load_w, split, line;
  int image_h, image_w;
  int stride_h, stride_w;  // in elements
  int pitch;               // from pixel to pixel, in 16 bytes
  Divider by_line, by_split;

  __device__ Halo(int rows, int cols, int load_w, int image_h, int image_w, int stride_h,
                  int stride_w, int pitch)
      : rows(rows),
        cols(cols),
        load_w(load_w),
        split((cols + load_w - 1) / load_w),
        line((cols + load_w - 1) / load_w * load_w),
        image_h(image_h),
        image_w(image_w),
        stride_h(stride_h),
        stride_w(stride_w),
        pitch(pitch),
        by_line(line),
        by_split(split) {}

  // Starts copying `count` chunks, 16 bytes of channels, of every pixel; the halo's first pixel is
  // (row, col) of the image. Zeros outside of it.
  template <class T>
  __device__ void load(const char* image, const int32_t* chunks, int count, int row, int col,
                       uint32_t target) const {
    each_cell(rows * line, count, [&](int chunk) {
      const char* from = image + int64_t(load_table(chunks + chunk)) * 16;
      const uint32_t to = target + chunk * 16;
      return [=](int pixel) {
        const uint32_t r = by_line(pixel), place = pixel - r * line;
        uint32_t c = place;
        if (load_w != 1) {
          const uint32_t residue = by_split(place);
          c = (place - residue * split) * load_w + residue;
        }
        const int y = row + int(r), x = col + int(c);
        const bool valid = uint32_t(y) < uint32_t(image_h) && uint32_t(x) < uint32_t(image_w);
        const int offset = valid ? y * stride_h + x * stride_w : 0;
        copy_async(to + pixel * pitch * 16, from + int64_t(offset) * kItem<T>, valid);
      };
    });
  }

  // Makes slots of 16 bytes, each channel from anywhere in the raw tile.
  template <class T>
  __device__ void gather(const int32_t* slots, int count, uint32_t raw, int slot_pitch,
                         uint32_t target) const {
    each_cell(rows * line, count, [&](int slot) {
      const Quad places = load_table128(slots + slot * 4);
      const uint32_t to = target + slot * 16;
      return [=](int pixel) {
        const uint32_t from = raw + pixel * pitch * 16;
        Quad made;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const uint32_t low = places.v[pair] & 0xFFFF, high = places.v[pair] >> 16;
          uint32_t v = low == 0xFFFF ? 0 : load_cell<T>(from + low * kItem<T>);
          // A number of 32 bits has no second one.
          if (kItem<T> == 2 && high != 0xFFFF) v |= load_shared16(from + high * 2) << 16;
          made.v[pair] = v;
        }
        store_shared128(to + pixel * slot_pitch * 16, made);
      };
    });
  }
};

// A table line of an image's tile: which image, and the tile's first pixel.
struct TilePlace {
  int image, row, col;
  __device__ TilePlace(int item, int tiles_h, int tiles_w, int height, int width) {
    const int tiles = tiles_h * tiles_w;
    image = item / tiles;
    const int tile = item - image * tiles, line = tile / tiles_w;
    row = line * height;
    col = (tile - line * tiles_w) * width;
  }
};

}  // namespace hetconv::cuda
