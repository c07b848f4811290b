// SPDX-License-Identifier: Apache-2.0
// Bringing halos and slabs of weights to shared memory, for the wide kernel.
#pragma once
#include "halo.h"
#include "wide_work.h"

namespace hetconv::cuda::wide {

// Brings the halo of blocks of channels, with three warps.
template <int kPixels> struct HaloBringer {
  const Wide& p;
  uint32_t shared;
  int stage_bytes, thread;

  // Starts copying one block for an item; every thread has one chunk of some pixels.
  __device__ void start(const Item& item, const int32_t* block, int stage) const {
    const int32_t* table = item.table;
    const int chunk = thread % kChunks, channels = load_table(block + kChunk + chunk);
    const int load_h = load_table(table + kLoadH), load_w = load_table(table + kLoadW);
    const int images = load_table(table + kImages);
    const int image_rows = load_table(table + kImagePitch) * load_h;
    const int cols = load_table(table + kHaloW), pixels = load_table(table + kHaloH) * cols;
    const int row_pitch = load_table(table + kRowPitch), half = load_table(table + kColHalf);
    const int top = load_table(table + kBaseH) + item.row * (kPixels / kColumns) * load_h;
    const int left = load_table(table + kBaseW) + item.col * load_w;
    const char* from = static_cast<const char*>(p.x) + int64_t(channels < 0 ? 0 : channels) * 16;
    const uint32_t to = shared + stage * stage_bytes + chunk * p.plane_pitch * 16;
    const Divider by_cols(cols), by_image(image_rows);
    for (int pixel = thread / kChunks; pixel < pixels; pixel += kHaloThreads / kChunks) {
      const int r = int(by_cols(pixel)), c = pixel - r * cols;
      const int nth = int(by_image(r)), part = nth < images ? nth : images - 1;
      const int y = top + r - part * image_rows, x = left + c, image = item.image + part;
      const bool valid = channels >= 0 && image < p.batch && uint32_t(y) < uint32_t(p.image_h) &&
                         uint32_t(x) < uint32_t(p.image_w);
      const int64_t offset = valid ? image * p.x_n + (y * p.x_h + x * p.x_w) : 0;
      const int place = load_w == 1 ? c : (c & 1) * half + (c >> 1);
      copy_async(to + (r * row_pitch + place) * 16, from + offset * 2, valid);
    }
  }

  __device__ void run(Ring ring, int first, int step, int rank) const {
    Item item;
    for (int index = first; item.find(p, index, rank); index += step) {
      const int32_t* block = p.blocks + load_table(item.head + kBlockBegin) * kBlockFields;
      const int count = load_table(item.head + kBlockCount);
      for (int b = 0; b < count; ++b, block += kBlockFields, ring.advance()) {
        phase_wait(ring.emptied(), ring.parity ^ 1);
        start(item, block, ring.at);
        copy_arrive(ring.filled());
      }
    }
    copy_commit();
    copy_wait<0>();  // no thread ends before its copies
  }
};

// Brings the slabs of both warpgroups, step by step, with one thread.
inline __device__ void bring_slabs(const Wide& p, uint32_t slabs, const Barriers& barriers,
                                   int first, int step, int rank) {
  const char* source = static_cast<const char*>(p.slabs);
  Ring rings[kWarpgroups] = {barriers.slabs(0), barriers.slabs(1)};
  Item item;
  for (int index = first; item.find(p, index, rank); index += step) {
    const int32_t* block = p.blocks + load_table(item.head + kBlockBegin) * kBlockFields;
    const int count = load_table(item.head + kBlockCount);
    for (int b = 0; b < count; ++b, block += kBlockFields) {
      int begin[kWarpgroups], steps[kWarpgroups];
#pragma unroll
      for (int w = 0; w < kWarpgroups; ++w) {
        begin[w] = load_table(block + kStepBegin + 2 * w);
        steps[w] = load_table(block + kStepCount + 2 * w);
      }
      for (int s = 0; s < steps[0] || s < steps[1]; ++s) {
#pragma unroll
        for (int w = 0; w < kWarpgroups; ++w) {
          if (s >= steps[w]) continue;
          Ring& ring = rings[w];
          phase_wait(ring.emptied(), ring.parity ^ 1);
          phase_expect(ring.filled(), kSlabBytes);
          const uint32_t to = slabs + (w * p.slots + ring.at) * kSlotBytes;
          const char* from = source + int64_t(begin[w] + s) * kSlabBytes;
          if (p.cluster == 1) {
            copy_bulk(to, from, kSlabBytes, ring.filled());
          } else {
            const int part = rank * (kSlabBytes / 2);
            copy_bulk_to(to + part, from + part, kSlabBytes / 2, ring.filled(), 3);
          }
          ring.advance();
        }
      }
    }
  }
}

}  // namespace hetconv::cuda::wide
