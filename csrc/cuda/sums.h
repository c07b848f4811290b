// SPDX-License-Identifier: Apache-2.0
// Sums of y and of its squares by filter, from the accumulators: what batch normalisation needs.
//
// Each warp keeps the sums of its own 32 pixels by 64 filters in shared memory over all tiles of
// its block, and the block leaves one line. All additions have a fixed order: two runs agree bit
// for bit.
#pragma once
#include "narrow.h"
#include "ptx.h"
#include "stage.h"

namespace hetconv::cuda {

struct Sums {
  uint32_t at;  // [warps_m, filters of the part, 2] float32
  int warps_m, width;

  static __host__ __device__ int bytes(int warps_m, int warps_n) {
    return warps_m * warps_n * kWarpFilters * 8;
  }
  __device__ Sums(const Narrow& p, uint32_t at)
      : at(at), warps_m(p.warps_m), width(p.warps_n * kWarpFilters) {}

  __device__ uint32_t cell(int warp_m, int column) const {
    return at + (warp_m * width + column) * 8;
  }

  __device__ void clear() const {
    for (int i = threadIdx.x; i < warps_m * width / 2; i += blockDim.x)
      store_shared128(at + i * 16, Quad{});
  }

  // Adds a warp's accumulators of one tile, where they are pixels of y.
  template <int kTiles>
  __device__ void add(const Narrow& p, const Target& target, const int32_t* rows,
                      const float (&acc)[2][kTiles][4], int warp_m, int warp_n, int lane) const {
    bool counts[4];
#pragma unroll
    for (int half = 0; half < 4; ++half)
      counts[half] = target.place(warp_m * kWarpPixels + lane / 4 + half * 8) >= 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = warp_n * kWarpFilters + n * 8 + lane % 4 * 2;
      float found[4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int f = load_table(rows + column + i);
        const float shift = p.shift && f >= 0 ? p.shift[f] : 0.0f;
#pragma unroll
        for (int half = 0; half < 4; ++half) {
          const float v = counts[half] ? acc[half / 2][n][half % 2 * 2 + i] + shift : 0.0f;
          found[2 * i] += v;
          found[2 * i + 1] += v * v;
        }
      }
      // The eight lanes of a column; all lanes of the warp come here.
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) found[i] += shuffle_xor(found[i], distance);
      if (lane < 4) {
        Quad total = load_shared128(cell(warp_m, column));
#pragma unroll
        for (int i = 0; i < 4; ++i) total.v[i] = as_bits(as_float(total.v[i]) + found[i]);
        store_shared128(cell(warp_m, column), total);
      }
    }
  }

  // Writes the block's line, after a barrier.
  __device__ void send(const Narrow& p, const int32_t* rows) const {
    float* line = p.sums + int64_t(blockIdx.x) * 2 * p.filters;
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
      const int f = load_table(rows + column);
      if (f < 0) continue;
      float total[2] = {};
      for (int warp_m = 0; warp_m < warps_m; ++warp_m) {
        const Pair part = load_shared64(cell(warp_m, column));
        total[0] += as_float(part.v[0]);
        total[1] += as_float(part.v[1]);
      }
      line[f] = total[0];
      line[p.filters + f] = total[1];
    }
  }
};

}  // namespace hetconv::cuda
