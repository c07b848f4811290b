// SPDX-License-Identifier: Apache-2.0
// How pixels and their channels come to shared memory for wide groups: as planes,
// [chunk of eight channels][pixel], 16 bytes each.
#pragma once
#include "ptx.h"
#include "wide.h"

namespace hetconv::cuda::wide {

// An operand in global memory, and the pitch of its planes.
struct Planes {
  const void* data;  // [batch, height, width, channels]
  int64_t image_stride;
  int32_t row_stride, col_stride;  // in elements
  int32_t batch, height, width;
  int32_t pitch;  // 16-byte units from a chunk's plane to the next

  // Starts copying eight chunks of a tile, with so many threads. Every thread has one chunk of the
  // pixels of a column, and walks down the images with nothing to divide: a narrow last band of
  // columns has several of its rows at a time.
  //
  // `table` is a line of `classes`, `chunks` has eight chunks, -1: zeros, and `unread` the rows and
  // columns that are not brought, by UnreadField; the tile begins at (row, col) of an image.
  template <int kThreads>
  __device__ __forceinline__ void copy(const int32_t* table, const int32_t* chunks,
                                       const int32_t* unread, int first_image, int row, int col,
                                       uint32_t shared, int thread) const {
    constexpr int kLanes = kThreads / kChunks;
    const int chunk = thread % kChunks, lane = thread / kChunks;
    const int channels = load_table(chunks + chunk);
    const int load_h = load_table(table + kLoadH), load_w = load_table(table + kLoadW);
    const int images = load_table(table + kImages);
    const int image_rows = load_table(table + kImagePitch) * load_h;
    const int rows = load_table(table + kHaloH) - load_table(unread + kBottom);
    const int cols = load_table(table + kHaloW) - load_table(unread + kRight);
    const int above = load_table(unread + kTop);
    const int line = load_table(table + kRowPitch) * 16, half = load_table(table + kColHalf);
    const int top = load_table(table + kBaseH) + row * load_h;
    const int left = load_table(table + kBaseW) + col * load_w;
    const uint32_t plane = shared + chunk * pitch * 16;
    for (int band = load_table(unread + kLeft); band < cols; band += kLanes) {
      const int wide = cols - band < kLanes ? cols - band : kLanes;
      int column = band + lane, first = 0, step = 1;
      if (wide <= kLanes / 2) {
        step = kLanes / wide;
        first = lane / wide;
        column -= first * wide;
      }
      if (first >= step || column >= cols) continue;
      const int place = half ? (column & 1) * half + (column >> 1) : column, x = left + column;
      const bool inside = channels >= 0 && uint32_t(x) < uint32_t(width);
      const uint32_t ahead = uint32_t(step) * row_stride * 2;
      for (int nth = 0; nth < images; ++nth) {
        const int image = first_image + nth;
        // In rows of the image. Bytes from its begin need 32 bits, and are right modulo 2^32 where
        // there is a pixel to be read.
        const int end = top + (nth + 1 < images ? image_rows : rows - nth * image_rows);
        const bool there = inside && image < batch;
        const char* from =
            static_cast<const char*>(data) + (image < batch ? image * image_stride * 2 : 0);
        const int begin = first + (nth ? 0 : above);
        uint32_t offset = uint32_t(top + begin) * row_stride + uint32_t(x) * col_stride;
        offset = (offset + channels * 8) * 2;
        uint32_t to = plane + (nth * image_rows + begin) * line + place * 16;
#pragma unroll 4
        for (int y = top + begin; y < end; y += step) {
          copy_async(to, from + offset, there && uint32_t(y) < uint32_t(height));
          offset += ahead;
          to += step * line;
        }
      }
    }
  }

  // The same of flattened rows; the tile begins at a place of the line.
  template <int kThreads>
  __device__ __forceinline__ void copy_flat(const int32_t* table, const int32_t* chunks,
                                            const int32_t* unread, int flat_pitch, int first,
                                            uint32_t shared, int thread) const {
    constexpr int kLanes = kThreads / kChunks;
    static_assert(kLanes <= 8, "a step of a thread must not leave out a row");
    const int chunk = thread % kChunks, channels = load_table(chunks + chunk);
    const int image_rows = load_table(table + kImagePitch);
    const int base_h = load_table(table + kBaseH), base_w = load_table(table + kBaseW);
    const int begin =
        load_table(unread + kTop) * flat_pitch + load_table(unread + kLeft) + thread / kChunks;
    const int end = load_table(table + kHaloH) * kColumns -
                    load_table(unread + kBottom) * flat_pitch - load_table(unread + kRight);
    const int lines = (first + begin) / flat_pitch;
    int image = lines / image_rows;
    // Row and column of the image, and where the next image and the next row begin.
    int row = lines - image * image_rows + base_h;
    int col = first + begin - lines * flat_pitch + base_w;
    const int last_row = image_rows + base_h, last_col = flat_pitch + base_w;
    // Bytes, of the images in 64 bits. Those from an image's begin are right modulo 2^32 where
    // there is a pixel to be read.
    const int64_t ahead = image_stride * 2;
    const char* from = static_cast<const char*>(data) + (image < batch ? image * ahead : 0);
    uint32_t offset = uint32_t(row) * row_stride + uint32_t(col) * col_stride + channels * 8;
    offset *= 2;
    const uint32_t next = uint32_t(kLanes) * col_stride * 2;
    const uint32_t next_row = (row_stride - uint32_t(flat_pitch) * col_stride) * 2;
    const uint32_t next_image = uint32_t(image_rows) * row_stride * 2;
    uint32_t to = shared + (chunk * pitch + begin) * 16;
    const uint32_t over = to + (end - begin) * 16;
    while (to < over) {
      const bool there = channels >= 0 && image < batch && uint32_t(row) < uint32_t(height);
      for (; col < last_col && to < over; col += kLanes, to += kLanes * 16) {
        copy_async(to, from + offset, there && uint32_t(col) < uint32_t(width));
        offset += next;
      }
      col -= flat_pitch;
      offset += next_row;
      if (++row == last_row) {
        row -= image_rows;
        offset -= next_image;
        if (++image < batch) from += ahead;
      }
    }
  }
};

}  // namespace hetconv::cuda::wide
