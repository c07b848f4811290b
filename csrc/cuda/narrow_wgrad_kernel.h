// SPDX-License-Identifier: Apache-2.0
// The program of wgrad for narrow groups: a tile of x with its halo and the same tile of dy are
// brought to shared memory once, and all taps and groups are computed from them.
//
// Columns (channels at taps, two slots of eight) are the sixteen rows of a matrix instruction,
// filters its eight columns, pixels what is summed over; both operands are transposed as they are
// read. A block keeps its part of the gradient in registers over all its tiles and leaves one
// float32 partial; `narrow_reduce` adds those in order, so two runs agree bit for bit.
//
// Tiles are brought by cp.async (narrow_wgrad.cu) or by TMA (narrow_tma.cu); see narrow_kernel.h.
#pragma once
#include <type_traits>

#include "narrow.h"
#include "narrow_halo.h"
#include "narrow_tma.h"
#include "ptx.h"

namespace hetconv::cuda {
namespace wgrad {

constexpr int kThreads = kMaxWarps * 32;

// Where things lie in shared memory, in bytes from its begin.
struct Layout {
  int dy, buffer, x_gathered, dy_gathered, mbarriers, total;

  __host__ __device__ Layout(const NarrowWgrad& p, bool tma) {
    const int pixels = p.tile_h * p.tile_w;
    dy = p.halo_pixels * p.x_pitch * 16;
    if (tma) dy = (dy + kTmaAlign - 1) / kTmaAlign * kTmaAlign;
    buffer = dy + pixels * p.dy_pitch * 16;
    if (tma) buffer = (buffer + kTmaAlign - 1) / kTmaAlign * kTmaAlign;
    x_gathered = p.buffers * buffer;
    dy_gathered = x_gathered + p.halo_pixels * p.x_slot_pitch * 16;
    mbarriers = dy_gathered + pixels * p.dy_slot_pitch * 16;
    total = mbarriers + (tma ? 2 * 8 : 0);
  }
};

// One unit's place in the operands, for a lane.
struct Unit {
  uint32_t columns[kUnitSteps];  // bytes from a pixel to its half's slot at its tap
  uint32_t filters;              // bytes from a pixel of dy to the lane's tile
  bool present, second;          // the unit; its second tile
};

// The program of a block; P is NarrowWgrad, or WgradTma for tiles that TMA brings.
template <class T, class P> __device__ __forceinline__ void compute(const P& p) {
  constexpr bool kTma = std::is_same_v<P, WgradTma>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t* table = p.geometry;
  const int32_t* head = p.heads + blockIdx.y * kWgradHeadFields;
  const int tiles_h = load_table(table + kTilesH), tiles_w = load_table(table + kTilesW);
  const int items = p.batch * tiles_h * tiles_w;
  const int load_h = load_table(table + kLoadH), load_w = load_table(table + kLoadW);
  const Halo halo(load_table(table + kHaloH), load_table(table + kHaloW), load_w, p.image_h,
                  p.image_w, p.x_h, p.x_w, p.x_pitch);
  const Halo own(p.tile_h, p.tile_w, 1, load_table(table + kPixelsH), load_table(table + kPixelsW),
                 p.y_h, p.y_w, p.dy_pitch);
  const Layout at(p, kTma);
  const uint32_t shared = shared_begin();
  const Divider by_width(p.tile_w);

  auto fetch = [&](int item, int buffer) {
    if (kTma && threadIdx.x) return;  // one thread asks for all of a box
    const TilePlace tile(item, tiles_h, tiles_w, p.tile_h, p.tile_w);
    const uint32_t to = shared + buffer * at.buffer;
    if constexpr (kTma) {
      const uint32_t phase = shared + at.mbarriers + buffer * 8;
      mbarrier_expect(phase,
                      (halo.rows * halo.cols * p.x_pitch + own.rows * own.cols * p.dy_pitch) * 16);
      tma_load(to, &p.x_map, load_table(p.chunks + load_table(head + kXChunkBegin)) * 8,
               tile.col * load_w + load_table(table + kBaseW),
               tile.row * load_h + load_table(table + kBaseH), tile.image, phase);
      tma_load(to + at.dy, &p.dy_map, load_table(p.chunks + load_table(head + kDyChunkBegin)) * 8,
               tile.col, tile.row, tile.image, phase);
      return;
    }
    halo.template load<T>(static_cast<const char*>(p.x) + int64_t(tile.image) * p.x_n * 2,
                          p.chunks + load_table(head + kXChunkBegin),
                          load_table(head + kXChunkCount),
                          tile.row * load_h + load_table(table + kBaseH),
                          tile.col * load_w + load_table(table + kBaseW), to);
    own.template load<T>(static_cast<const char*>(p.dy) + int64_t(tile.image) * p.y_n * 2,
                         p.chunks + load_table(head + kDyChunkBegin),
                         load_table(head + kDyChunkCount), tile.row, tile.col, to + at.dy);
  };

  const int unit_begin = load_table(head + kUnitBegin), unit_count = load_table(head + kUnitCount);
  Unit units[kWarpUnits];
#pragma unroll
  for (int u = 0; u < kWarpUnits; ++u) {
    const int index = warp + u * p.warps;
    units[u].present = index < unit_count;
    const int32_t* fields = p.units + (unit_begin + (units[u].present ? index : 0)) * kUnitFields;
#pragma unroll
    for (int s = 0; s < kUnitSteps; ++s)
      units[u].columns[s] = ((uint32_t(load_table(fields + s)) >> (lane & 8) * 2) & 0xFFFF) * 16;
    const int first = load_table(fields + kUnitSteps), second = load_table(fields + kUnitSteps + 1);
    units[u].second = second >= 0;
    units[u].filters = uint32_t(lane >= 16 && second >= 0 ? second : first) * 16;
  }

  float acc[kWarpUnits][kUnitSteps][kUnitTiles][4] = {};
  const bool ahead = p.buffers == 2;
  if constexpr (kTma) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.buffers; ++i) mbarrier_init(shared + at.mbarriers + i * 8, 1);
      mbarrier_init_done();
      fence_async();
    }
    barrier();
  }
  if (ahead && int(blockIdx.x) < items) fetch(blockIdx.x, 0);
  if constexpr (!kTma) copy_commit();
  uint32_t parity = 1;  // of the phase of the buffer in use
  int buffer = ahead ? 1 : 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    if (ahead) {
      buffer = 1 - buffer;
      if (item + int(gridDim.x) < items) fetch(item + gridDim.x, 1 - buffer);
      if constexpr (!kTma) {
        copy_commit();
        copy_wait<1>();
      }
    } else {
      fetch(item, 0);
      if constexpr (!kTma) {
        copy_commit();
        copy_wait<0>();
      }
    }
    if constexpr (kTma) {
      parity ^= buffer == 0;
      mbarrier_wait(shared + at.mbarriers + buffer * 8, parity, shared + at.mbarriers);
    } else {
      barrier();
    }
    uint32_t x = shared + buffer * at.buffer, dy = x + at.dy;
    int x_pitch = p.x_pitch, dy_pitch = p.dy_pitch;
    if (p.x_slot_pitch || p.dy_slot_pitch) {
      if (p.x_slot_pitch) {
        halo.template gather<T>(p.slots + load_table(head + kXSlotBegin) * 4,
                                load_table(head + kXSlotCount), x, p.x_slot_pitch,
                                shared + at.x_gathered);
        x = shared + at.x_gathered;
        x_pitch = p.x_slot_pitch;
      }
      if (p.dy_slot_pitch) {
        own.template gather<T>(p.slots + load_table(head + kDySlotBegin) * 4,
                               load_table(head + kDySlotCount), dy, p.dy_slot_pitch,
                               shared + at.dy_gathered);
        dy = shared + at.dy_gathered;
        dy_pitch = p.dy_slot_pitch;
      }
      barrier();
    }
    for (int k = 0; k < p.tile_h * p.tile_w; k += 16) {
      // Lanes of both operands' matrices: eight pixels each, the second eight for the upper lanes
      // of x, and for the upper eight of sixteen of dy.
      const uint32_t mx = k + lane % 8 + lane / 16 * 8, my = k + lane % 16;
      const uint32_t i = by_width(mx), j = mx - i * p.tile_w;
      const uint32_t x_pixel = x + (i * load_h * halo.line + j) * x_pitch * 16;
      const uint32_t dy_pixel = dy + my * dy_pitch * 16;
#pragma unroll
      for (int u = 0; u < kWarpUnits; ++u) {
        if (!units[u].present) continue;
        const Quad b = load_matrices_transposed(dy_pixel + units[u].filters);
#pragma unroll
        for (int s = 0; s < kUnitSteps; ++s) {
          const Quad a = load_matrices_transposed(x_pixel + units[u].columns[s]);
          multiply<T>(acc[u][s][0], a, b.v[0], b.v[1]);
          if (units[u].second) multiply<T>(acc[u][s][1], a, b.v[2], b.v[3]);
        }
      }
    }
    barrier();
  }
  if constexpr (!kTma) copy_wait<0>();

#pragma unroll
  for (int u = 0; u < kWarpUnits; ++u) {
    if (!units[u].present) continue;
    const int64_t unit = int64_t(blockIdx.x) * p.unit_count + unit_begin + warp + u * p.warps;
    float* to = p.partials + unit * kUnitValues + lane * 4;
#pragma unroll
    for (int s = 0; s < kUnitSteps; ++s)
#pragma unroll
      for (int n = 0; n < kUnitTiles; ++n) store128(to + (s * kUnitTiles + n) * 128, acc[u][s][n]);
  }
}

// As narrow_wgrad, for tiles that TMA brings; and the blocks that the device then holds.
int64_t max_resident_tma(const NarrowWgrad& p, DType dtype);
const char* launch_tma(const NarrowWgrad& p, DType dtype, void* stream);

}  // namespace wgrad
}  // namespace hetconv::cuda
