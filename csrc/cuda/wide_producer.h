// SPDX-License-Identifier: Apache-2.0
// The producers of the wide kernel: they load halos and slabs of weights to shared memory.
#pragma once
#include "wide_planes.h"
#include "wide_work.h"

namespace hetconv::cuda::wide {

// Loads the halo of blocks of channels, with two warps.
template <int kPixels, bool kFlat> struct HaloProducer {
  const Wide& p;
  uint32_t shared;
  int stage_bytes, thread;

  // Starts copying one block for an item.
  __device__ void start(const Item& item, const int32_t* block, int stage) const {
    const Planes planes{p.x, p.x_n, p.x_h, p.x_w, p.batch, p.image_h, p.image_w, p.plane_pitch};
    const uint32_t to = shared + stage * stage_bytes;
    if (kFlat)
      planes.copy_flat<kHaloThreads>(item.table, block + kChunk, block + kUnread, p.flat_pitch,
                                     item.row * kPixels, to, thread);
    else
      planes.copy<kHaloThreads>(item.table, block + kChunk, block + kUnread, item.image,
                                item.row * (kPixels / kColumns), item.col, to, thread);
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
      const int32_t* own = block + kSteps + group * kStepsFields;
      const int steps = load_table(own + kStepCount);
      const char* from = source + int64_t(load_table(own + kStepBegin)) * kSlabBytes;
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
