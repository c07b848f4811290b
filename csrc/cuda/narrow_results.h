// SPDX-License-Identifier: Apache-2.0
// The epilogue of the narrow kernel. Results on their way from registers to y, and the residual on
// its way in, go through a staging tile in shared memory, so that device memory sees 16-byte
// accesses.
#pragma once
#include <type_traits>

#include "epilogue.h"
#include "narrow.h"
#include "narrow_halo.h"
#include "narrow_operands.h"
#include "ptx.h"

namespace hetconv::cuda {

// Bytes of the staging tile from pixel to pixel, of numbers of `item` bytes.
inline __host__ __device__ int stage_pitch(const Narrow& p, int item) {
  return p.warps_n * kWarpFilters * item + 16;
}

// The pixels of y that a tile writes.
struct Target {
  int64_t corner;  // the tile's first pixel in y, in elements
  int rows, cols;  // of the tile that are in y
  int step_h, step_w;
  Divider by_width;

  __device__ Target(const Narrow& p, const int32_t* table, const TilePlace& tile)
      : by_width(p.tile_w) {
    const int store_h = load_table(table + kStoreH), store_w = load_table(table + kStoreW);
    const int rows_left = load_table(table + kPixelsH) - tile.row;
    rows = rows_left < p.tile_h ? rows_left : p.tile_h;
    cols = load_table(table + kPixelsW) - tile.col;
    step_h = store_h * p.y_h;
    step_w = store_w * p.y_w;
    corner = tile.image * p.y_n +
             int64_t(tile.row * store_h + load_table(table + kFirstH)) * p.y_h +
             int64_t(tile.col * store_w + load_table(table + kFirstW)) * p.y_w;
  }
  // Pixel m of the tile, in elements from the corner; -1 if it is not in y.
  __device__ int place(int m) const {
    const int i = int(by_width(m)), j = m - i * int(by_width.by);
    return i < rows && j < cols ? i * step_h + j * step_w : -1;
  }
};

// Where the filters of a part stand in the staging tile: as in y where 16-byte accesses reach it,
// else in the order of the part, to be written one by one.
template <class T> struct Columns {
  using Number = std::conditional_t<kItem<T> == 4, uint32_t, uint16_t>;
  static constexpr int kVector = 16 / kItem<T>;  // numbers of a 16-byte access

  const int32_t* rows;
  int first, count, pitch, width;
  bool vectors;

  __device__ Columns(const Narrow& p, const int32_t* head, int part)
      : rows(p.rows + part * p.warps_n * kWarpFilters),
        first(load_table(head + kFilterFirst)),
        count(load_table(head + kFilterCount)),
        pitch(stage_pitch(p, kItem<T>)),
        width(p.warps_n * kWarpFilters) {
    vectors = p.vector_stores && count && (first | count) % kVector == 0;
  }
  // The byte of a line that has the part's filter number `column`, which is filter f.
  __device__ uint32_t cell(int column, int f) const {
    return (vectors ? f - first : column) * kItem<T>;
  }

  // Loads the residual to the staging tile; zeros for pixels and filters that y has not.
  __device__ void load(const Narrow& p, const Target& target, uint32_t stage) const {
    const Number* from = static_cast<const Number*>(p.residual) + target.corner;
    const int pixels = p.warps_m * kWarpPixels;
    if (vectors) {
      each_cell(pixels, count / kVector, [&](int column) {
        const Number* own = from + first + column * kVector;
        return [=](int m) {
          const int offset = target.place(m);
          Quad q = {};
          if (offset >= 0) q = load_table128(own + offset);
          store_shared128(stage + m * pitch + column * 16, q);
        };
      });
    } else {
      each_cell(pixels, width, [&](int column) {
        const int f = load_table(rows + column);
        return [=](int m) {
          const int offset = target.place(m);
          const Number v = offset >= 0 && f >= 0 ? from[offset + f] : 0;
          store_cell<T>(stage + m * pitch + column * kItem<T>, v);
        };
      });
    }
  }

  // Writes the staging tile to y.
  __device__ void store(const Narrow& p, const Target& target, uint32_t stage) const {
    Number* to = static_cast<Number*>(p.y) + target.corner;
    const int pixels = p.tile_h * p.tile_w;
    if (vectors) {
      each_cell(pixels, count / kVector, [&](int column) {
        Number* own = to + first + column * kVector;
        return [=](int m) {
          const int offset = target.place(m);
          if (offset >= 0) store128(own + offset, load_shared128(stage + m * pitch + column * 16));
        };
      });
    } else {
      each_cell(pixels, width, [&](int column) {
        const int f = load_table(rows + column);
        return [=](int m) {
          const int offset = target.place(m);
          if (offset >= 0 && f >= 0)
            to[offset + f] = Number(load_cell<T>(stage + m * pitch + column * kItem<T>));
        };
      });
    }
  }
};

// The results of a warp, 32 pixels by 64 filters: [fragment of pixels][tile of filters][register].
template <int kTiles> using WarpResults = float[2][kTiles][4];

// Writes act(scale * acc + shift + what is staged of the residual) of a warp to the staging tile.
template <class T, class Activation, int kTiles>
__device__ __forceinline__ void stage_results(const Narrow& p, const Columns<T>& columns,
                                              uint32_t stage, const WarpResults<kTiles>& acc,
                                              int warp_m, int warp_n, int lane) {
  const Activation activate(p.act);
  const uint32_t top = stage + (warp_m * kWarpPixels + lane / 4) * columns.pitch;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int column = warp_n * kWarpFilters + n * 8 + lane % 4 * 2;
    const int f0 = load_table(columns.rows + column), f1 = load_table(columns.rows + column + 1);
    if (f0 < 0) continue;  // then f1 is none either
    const bool second = f1 >= 0;
    float scale[2] = {1.0f, 1.0f}, shifts[2] = {0.0f, 0.0f};
    if (p.scale) scale[0] = p.scale[f0], scale[1] = second ? p.scale[f1] : 1.0f;
    if (p.shift) shifts[0] = p.shift[f0], shifts[1] = second ? p.shift[f1] : 0.0f;
    const Cells<T> cells(columns.cell(column, f0), columns.cell(column + 1, f1), second);
#pragma unroll
    for (int half = 0; half < 4; ++half) {
      const uint32_t row = top + half * 8 * columns.pitch;
      float v[2] = {acc[half / 2][n][half % 2 * 2], acc[half / 2][n][half % 2 * 2 + 1]};
      v[0] = v[0] * scale[0] + shifts[0];
      v[1] = v[1] * scale[1] + shifts[1];
      if (p.residual) cells.add_to(v, row);
      cells.store(activate, v, row);
    }
  }
}

}  // namespace hetconv::cuda
