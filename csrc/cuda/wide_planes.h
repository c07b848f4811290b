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
  // columns that are not brought, as in `blocks`; the tile begins at (row, col) of an image.
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
    const int rows = load_table(table + kHaloH) - load_table(unread + 1);
    const int cols = load_table(table + kHaloW) - load_table(unread + 3);
    const int above = load_table(unread);
    const int line = load_table(table + kRowPitch) * 16, half = load_table(table + kColHalf);
    const int top = load_table(table + kBaseH) + row * load_h;
    const int left = load_table(table + kBaseW) + col * load_w;
    const uint32_t plane = shared + chunk * pitch * 16;
    for (int band = load_table(unread + 2); band < cols; band += kLanes) {
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
};

}  // namespace hetconv::cuda::wide
