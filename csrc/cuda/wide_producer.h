// SPDX-License-Identifier: Apache-2.0
// The producers of the wide kernel: they load halos and slabs of weights to shared memory.
#pragma once
#include "halo.h"
#include "wide_work.h"

namespace hetconv::cuda::wide {

// Loads the halo of blocks of channels, with two warps.
template <int kPixels> struct HaloProducer {
  const Wide& p;
  uint32_t shared;
  int stage_bytes, thread;

  // Starts copying one block for an item. Every thread has one chunk of the pixels of a column, and
  // walks down the images with nothing to divide: a narrow last band of columns has several of its
  // rows at a time.
  __device__ void start(const Item& item, const int32_t* block, int stage) const {
    constexpr int kLanes = kHaloThreads / kChunks;
    const int32_t* table = item.table;
    const int chunk = thread % kChunks, lane = thread / kChunks;
    const int channels = load_table(block + kChunk + chunk);
    const int load_h = load_table(table + kLoadH), load_w = load_table(table + kLoadW);
    const int images = load_table(table + kImages);
    const int image_rows = load_table(table + kImagePitch) * load_h;
    const int rows = load_table(table + kHaloH) - load_table(block + kUnreadBottom);
    const int cols = load_table(table + kHaloW) - load_table(block + kUnreadRight);
    const int unread = load_table(block + kUnreadTop);
    const int pitch = load_table(table + kRowPitch) * 16, half = load_table(table + kColHalf);
    const int top = load_table(table + kBaseH) + item.row * (kPixels / kColumns) * load_h;
    const int left = load_table(table + kBaseW) + item.col * load_w;
    const uint32_t plane = shared + stage * stage_bytes + chunk * p.plane_pitch * 16;
    for (int band = load_table(block + kUnreadLeft); band < cols; band += kLanes) {
      const int width = cols - band < kLanes ? cols - band : kLanes;
      int column = band + lane, first = 0, step = 1;
      if (width <= kLanes / 2) {
        step = kLanes / width;
        first = lane / width;
        column -= first * width;
      }
      if (first >= step || column >= cols) continue;
      const int place = half ? (column & 1) * half + (column >> 1) : column, x = left + column;
      const bool inside = channels >= 0 && uint32_t(x) < uint32_t(p.image_w);
      const uint32_t ahead = uint32_t(step) * p.x_h * 2;
      for (int nth = 0; nth < images; ++nth) {
        const int image = item.image + nth;
        // In rows of the image. Bytes from its begin need 32 bits, and are right modulo 2^32 where
        // there is a pixel to be read.
        const int end = top + (nth + 1 < images ? image_rows : rows - nth * image_rows);
        const bool there = inside && image < p.batch;
        const char* from =
            static_cast<const char*>(p.x) + (image < p.batch ? image * p.x_n * 2 : 0);
        const int begin = first + (nth ? 0 : unread);
        uint32_t offset = uint32_t(top + begin) * p.x_h + uint32_t(x) * p.x_w;
        offset = (offset + channels * 8) * 2;
        uint32_t to = plane + (nth * image_rows + begin) * pitch + place * 16;
#pragma unroll 4
        for (int y = top + begin; y < end; y += step) {
          copy_async(to, from + offset, there && uint32_t(y) < uint32_t(p.image_h));
          offset += ahead;
          to += step * pitch;
        }
      }
    }
  }

  __device__ void run(Ring ring, int first, int step, int rank) const {
    Item item;
    for (int index = first; item.find(p, index, rank); index += step) {
      const int32_t* block = p.blocks + load_table(item.head + kBlockBegin) * kBlockFields;
      const int count = load_table(item.head + kBlockCount);
      for (int b = 0; b < count; ++b, block += kBlockFields, ring.advance()) {
        ring.wait_emptied();
        start(item, block, ring.at);
        copy_arrive(ring.filled());
      }
    }
    copy_commit();
    copy_wait<0>();  // no thread ends before its copies
  }
};

// Loads the slabs of a warpgroup, step by step, with one thread. Each warpgroup has a thread of its
// own, in warps of their own, so that neither waits for what the other has not used.
inline __device__ void produce_slabs(const Wide& p, uint32_t slabs, Ring ring, int group, int first,
                                     int step, int rank) {
  const char* source = static_cast<const char*>(p.slabs);
  Item item;
  for (int index = first; item.find(p, index, rank); index += step) {
    const int32_t* block = p.blocks + load_table(item.head + kBlockBegin) * kBlockFields;
    const int count = load_table(item.head + kBlockCount);
    for (int b = 0; b < count; ++b, block += kBlockFields) {
      const int steps = load_table(block + kStepCount + 2 * group);
      const char* from = source + int64_t(load_table(block + kStepBegin + 2 * group)) * kSlabBytes;
      for (int s = 0; s < steps; ++s, from += kSlabBytes, ring.advance()) {
        ring.wait_emptied();
        mbarrier_expect(ring.filled(), kSlabBytes);
        const uint32_t to = slabs + ring.at * kSlotBytes;
        if (p.cluster == 1) {
          copy_bulk(to, from, kSlabBytes, ring.filled());
        } else {
          const int part = rank * (kSlabBytes / 2);
          copy_bulk_to(to + part, from + part, kSlabBytes / 2, ring.filled(), 3);
        }
      }
    }
  }
}

}  // namespace hetconv::cuda::wide
