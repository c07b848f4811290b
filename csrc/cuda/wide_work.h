// SPDX-License-Identifier: Apache-2.0
// What the blocks of the wide kernel work on: places in shared memory, rings of them, and tiles.
#pragma once
#include "hopper.h"
#include "wide.h"

namespace hetconv::cuda::wide {

constexpr int kGroupThreads = 128;
constexpr int kThreads = kGroupThreads * (1 + kWarpgroups);
constexpr int kHaloThreads = kGroupThreads - 32 * kWarpgroups;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // 128 * (56 + 2 * 224) of 65536
constexpr int kStagedBytes = kStagedPixels * kStagedPitch;
constexpr int kSlotBytes = kSlabBytes;
// Steps that the first warpgroup computes before the second one begins. From then on one of them
// multiplies while the other writes results, which takes about as long as these steps: with both at
// it at a time the matrix units would idle.
constexpr int kLead = 4;

// Where things lie in shared memory, in bytes from its begin.
struct Layout {
  int halo, stage, slabs, staged, barriers, total;

  __host__ __device__ explicit Layout(const Wide& p) {
    halo = 0;
    stage = p.plane_pitch * kChunks * 16;
    slabs = halo + p.stages * stage;
    staged = slabs + p.slots * kWarpgroups * kSlotBytes;
    barriers = staged + kWarpgroups * 2 * kStagedBytes;
    total = barriers + 2 * (p.stages + kWarpgroups * p.slots + 1) * 8;
  }
};

// A ring of places in shared memory, each with a barrier that says it is full and one for empty.
struct Ring {
  uint32_t first;  // barrier of the block, from which they are counted
  uint32_t full, empty;
  int count, at;
  uint32_t parity;

  __device__ Ring(uint32_t first, uint32_t barriers, int count)
      : first(first), full(barriers), empty(barriers + count * 8), count(count), at(0), parity(0) {}
  __device__ uint32_t filled() const { return full + at * 8; }
  __device__ uint32_t emptied() const { return empty + at * 8; }
  __device__ void wait_filled() const { mbarrier_wait(filled(), parity, first); }
  __device__ void wait_emptied() const { mbarrier_wait(emptied(), parity ^ 1, first); }
  __device__ void advance() {
    if (++at == count) at = 0, parity ^= 1;
  }
};

// The barriers in shared memory: of the halo's ring, then of the slabs' of each warpgroup, then the
// one that the second warpgroup begins after.
struct Barriers {
  uint32_t begin;
  int stages, slots;

  __device__ Ring halo() const { return Ring(begin, begin, stages); }
  __device__ Ring slabs(int group) const {
    return Ring(begin, begin + (stages + group * slots) * 16, slots);
  }
  __device__ uint32_t lead() const { return begin + (stages + kWarpgroups * slots) * 16; }
};

// What a block computes at a time: a tile of a class, with the filters of a pair.
struct Item {
  const int32_t* table;  // the class
  const int32_t* head;
  int pair, image, row, col;
  bool real;  // there is such a tile: the last cluster may have one too many

  // Pairs of the same tile follow each other, so that its halo is read from the L2 cache.
  __device__ bool find(const Wide& p, int index, int rank) {
    for (int kind = 0; kind < p.class_count; ++kind) {
      table = p.classes + kind * kClassFields;
      const int tiles_h = load_table(table + kTilesH), tiles_w = load_table(table + kTilesW);
      const int images = load_table(table + kImages);
      const int tiles = (p.batch + images - 1) / images * tiles_h * tiles_w;
      const int items = (tiles + p.cluster - 1) / p.cluster * p.pairs;
      if (index < items) {
        const int group = index / p.pairs, own = group * p.cluster + rank;
        pair = index - group * p.pairs;
        head = p.heads + (kind * p.pairs + pair) * kHeadFields;
        real = own < tiles;
        const int stack = own / (tiles_h * tiles_w), place = own - stack * tiles_h * tiles_w;
        image = stack * images;
        row = place / tiles_w;
        col = (place - row * tiles_w) * kColumns;
        return true;
      }
      index -= items;
    }
    return false;
  }
};

}  // namespace hetconv::cuda::wide
