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

#include "launchers.h"
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

// Pixels of an operand in shared memory: the first one, and from one to the next, in 16 bytes.
struct Pixels {
  uint32_t at;
  int pitch;
};

// One unit's place in the operands, for a lane.
struct Unit {
  uint32_t columns[kUnitSteps];  // bytes from a pixel to its half's slot at its tap
  uint32_t filters;              // bytes from a pixel of dy to the lane's tile
  bool present, second;          // the unit; its second tile

  __device__ void load(const int32_t* fields, int lane) {
#pragma unroll
    for (int s = 0; s < kUnitSteps; ++s) {
      const uint32_t word = uint32_t(load_table(fields + kStepWord + s));
      columns[s] = ((word >> (lane & 8) * 2) & 0xFFFF) * 16;
    }
    const int one = load_table(fields + kDyPlace), other = load_table(fields + kDyPlace + 1);
    second = other >= 0;
    filters = uint32_t(lane >= 16 && second ? other : one) * 16;
  }
};

// The gradients of a warp's units.
using Gradients = float[kWarpUnits][kUnitSteps][kUnitTiles][4];

// What one block works on: all tiles by one part of the units (a head). P is NarrowWgrad, or
// WgradTma for tiles that TMA brings.
template <class P> struct Work {
  static constexpr bool kTma = std::is_same_v<P, WgradTma>;
  const P& p;
  const int32_t* head;  // its line in the table
  const int load_h, load_w;
  const Halo halo, own;  // tiles of x and of dy
  const Layout at;
  const uint32_t shared;

  __device__ explicit Work(const P& p)
      : p(p),
        head(p.heads + blockIdx.y * kWgradHeadFields),
        load_h(field(kLoadH)),
        load_w(field(kLoadW)),
        halo(field(kHaloH), field(kHaloW), load_w, p.image_h, p.image_w, p.x_h, p.x_w, p.x_pitch),
        own(p.tile_h, p.tile_w, 1, field(kPixelsH), field(kPixelsW), p.y_h, p.y_w, p.dy_pitch),
        at(p, kTma),
        shared(shared_begin()) {}

  __device__ int field(ClassField name) const { return load_table(p.geometry + name); }
  __device__ int field(WgradHeadField name) const { return load_table(head + name); }
  __device__ int items() const { return p.batch * field(kTilesH) * field(kTilesW); }
  __device__ uint32_t buffer_at(int buffer) const { return shared + buffer * at.buffer; }
  __device__ uint32_t mbarrier_at(int buffer) const { return shared + at.mbarriers + buffer * 8; }

  __device__ __forceinline__ void init_mbarriers() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.buffers; ++i) mbarrier_init(mbarrier_at(i), 1);
      mbarrier_init_done();
      fence_async();
    }
    barrier();
  }

  // Starts the copy of a tile of both operands; with two buffers it is prefetched while the one
  // before is computed from (double buffering).
  template <class T> __device__ __forceinline__ void prefetch(int item, int buffer) const {
    if (kTma && threadIdx.x) return;  // one thread, the producer, asks for all of a box
    const TilePlace tile(item, field(kTilesH), field(kTilesW), p.tile_h, p.tile_w);
    const int32_t* x_chunks = p.chunks + field(kXChunkBegin);
    const int32_t* dy_chunks = p.chunks + field(kDyChunkBegin);
    const int row = tile.row * load_h + field(kBaseH), col = tile.col * load_w + field(kBaseW);
    const uint32_t to = buffer_at(buffer);
    if constexpr (kTma) {
      const uint32_t phase = mbarrier_at(buffer);
      mbarrier_expect(phase,
                      (halo.rows * halo.cols * p.x_pitch + own.rows * own.cols * p.dy_pitch) * 16);
      tma_load(to, &p.x_map, load_table(x_chunks) * 8, col, row, tile.image, phase);
      tma_load(to + at.dy, &p.dy_map, load_table(dy_chunks) * 8, tile.col, tile.row, tile.image,
               phase);
    } else {
      halo.template load<T>(static_cast<const char*>(p.x) + int64_t(tile.image) * p.x_n * 2,
                            x_chunks, field(kXChunkCount), row, col, to);
      own.template load<T>(static_cast<const char*>(p.dy) + int64_t(tile.image) * p.y_n * 2,
                           dy_chunks, field(kDyChunkCount), tile.row, tile.col, to + at.dy);
    }
  }

  // Waits for the tile in a buffer: all copies but those of the other one have ended.
  __device__ __forceinline__ void wait_filled(int buffer, uint32_t& parity) const {
    if constexpr (kTma) {
      parity ^= buffer == 0;
      mbarrier_wait(mbarrier_at(buffer), parity, mbarrier_at(0));
    } else {
      copy_commit();
      if (p.buffers == 2)
        copy_wait<1>();
      else
        copy_wait<0>();
      barrier();
    }
  }

  // Gathers the slots of an operand's tile where it has any, at a place in shared memory; returns
  // the pixels to compute from.
  template <class T>
  __device__ __forceinline__ Pixels gather(const Halo& tile, uint32_t raw, WgradHeadField begin,
                                           WgradHeadField count, int slot_pitch, int place) const {
    if (!slot_pitch) return {raw, tile.pitch};
    tile.template gather<T>(p.slots + field(begin) * 4, field(count), raw, slot_pitch,
                            shared + place);
    return {shared + place, slot_pitch};
  }

  __device__ __forceinline__ void load_units(Unit (&units)[kWarpUnits], int warp, int lane) const {
    const int begin = field(kUnitBegin), count = field(kUnitCount);
#pragma unroll
    for (int u = 0; u < kWarpUnits; ++u) {
      const int index = warp + u * p.warps;
      units[u].present = index < count;
      units[u].load(p.units + (begin + (units[u].present ? index : 0)) * kUnitFields, lane);
    }
  }

  // Adds the products of a tile's pixels.
  template <class T>
  __device__ __forceinline__ void multiply_tile(Gradients& acc, const Unit (&units)[kWarpUnits],
                                                const Pixels& x, const Pixels& dy,
                                                const Divider& by_width, int lane) const {
    for (int k = 0; k < p.tile_h * p.tile_w; k += 16) {
      // Lanes of both operands' matrices: eight pixels each, the second eight for the upper lanes
      // of x, and for the upper eight of sixteen of dy.
      const uint32_t mx = k + lane % 8 + lane / 16 * 8, my = k + lane % 16;
      const uint32_t i = by_width(mx), j = mx - i * p.tile_w;
      const uint32_t x_pixel = x.at + (i * load_h * halo.line + j) * x.pitch * 16;
      const uint32_t dy_pixel = dy.at + my * dy.pitch * 16;
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
  }

  // Leaves the block's partial.
  __device__ __forceinline__ void store(const Gradients& acc, const Unit (&units)[kWarpUnits],
                                        int warp, int lane) const {
    const int begin = field(kUnitBegin);
#pragma unroll
    for (int u = 0; u < kWarpUnits; ++u) {
      if (!units[u].present) continue;
      const int64_t unit = int64_t(blockIdx.x) * p.unit_count + begin + warp + u * p.warps;
      float* to = p.partials + unit * kUnitValues + lane * 4;
#pragma unroll
      for (int s = 0; s < kUnitSteps; ++s)
#pragma unroll
        for (int n = 0; n < kUnitTiles; ++n)
          store128(to + (s * kUnitTiles + n) * 128, acc[u][s][n]);
    }
  }
};

// The program of a block.
template <class T, class P> __device__ __forceinline__ void compute(const P& p) {
  const Work<P> work(p);
  constexpr bool kTma = Work<P>::kTma;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int items = work.items(), step = gridDim.x;
  const Layout& at = work.at;
  const Divider by_width(p.tile_w);
  Unit units[kWarpUnits];
  work.load_units(units, warp, lane);

  Gradients acc = {};
  if constexpr (kTma) work.init_mbarriers();
  const bool ahead = p.buffers == 2;
  if (ahead && int(blockIdx.x) < items) work.template prefetch<T>(blockIdx.x, 0);
  if constexpr (!kTma) copy_commit();
  int buffer = p.buffers - 1;  // the one in use; the first tile changes it to 0
  uint32_t parity = 1;         // of its barrier's phase
  for (int item = blockIdx.x; item < items; item += step) {
    if (ahead) buffer = 1 - buffer;
    const int next = ahead ? item + step : item;
    if (next < items) work.template prefetch<T>(next, ahead ? 1 - buffer : 0);
    work.wait_filled(buffer, parity);
    const uint32_t raw = work.buffer_at(buffer);
    const Pixels x = work.template gather<T>(work.halo, raw, kXSlotBegin, kXSlotCount,
                                             p.x_slot_pitch, at.x_gathered);
    const Pixels dy = work.template gather<T>(work.own, raw + at.dy, kDySlotBegin, kDySlotCount,
                                              p.dy_slot_pitch, at.dy_gathered);
    if (p.x_slot_pitch || p.dy_slot_pitch) barrier();
    work.template multiply_tile<T>(acc, units, x, dy, by_width, lane);
    barrier();
  }
  if constexpr (!kTma) copy_wait<0>();
  work.store(acc, units, warp, lane);
}

// As narrow_wgrad, for tiles that TMA brings; and the blocks that the device then holds.
int64_t max_resident_tma(const NarrowWgrad& p, DType dtype);
const char* launch_tma(const NarrowWgrad& p, DType dtype, void* stream);

}  // namespace wgrad
}  // namespace hetconv::cuda
