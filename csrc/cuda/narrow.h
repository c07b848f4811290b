// SPDX-License-Identifier: Apache-2.0
// Launchers of the kernels for narrow groups (8, 16, 32 filters), plain C++: no CUDA, no torch.
//
// Everything irregular is decided before: hetconv_kernels/backends/cuda/narrow_lowering.py makes
// the tables, and its docstring gives their meaning with an example. All pointers are device
// pointers, all strides count elements, activations are channels_last (stride 1 between channels).
// Numbers are of 16 bits, and of fprop and dgrad also of float32; what holds 16 bytes of channels
// holds eight of the former, four of the latter.
#pragma once
#include <array>
#include <cstdint>

#include "../types.h"

namespace hetconv::cuda {

using hetconv::Act;
using hetconv::DType;

constexpr int kWarpPixels = 32;   // of one warp's tile: two fragments of sixteen
constexpr int kWarpFilters = 64;  // of one warp's tile: eight fragments of eight
constexpr int kMaxWarps = 8;      // of one block
constexpr int kMostMaps = 4;      // classes of pixels whose halos TMA can bring
constexpr int kLists = 15;        // step lists of one warp column: 1 of 64 filters, 2 of 32, ...

// Fields of a line of `classes`.
enum ClassField {
  kPixelsH,  // pixels that the class computes in one image
  kPixelsW,
  kTilesH,  // tiles that they are cut into
  kTilesW,
  kLoadH,  // tile pixel (i, j), tap at (r, c) of the halo reads halo row i * load_h + r
  kLoadW,
  kBaseH,  // row of the image at halo row 0 of the first tile
  kBaseW,
  kHaloH,  // size of the halo tile
  kHaloW,
  kStoreH,  // pixel (i, j) is written to row first_h + i * store_h
  kStoreW,
  kFirstH,
  kFirstW,
  kClassFields
};

// Fields of a line of `heads`, one for each class and part of the filters.
enum HeadField {
  kWordBegin,
  kWordCount,
  kFragmentBegin,  // a fragment is the packed weights of 8 filters in one step: 256 bytes
  kFragmentCount,
  kFilterFirst,  // the part's filters are filter_first ... + filter_count - 1 in some order,
  kFilterCount,  // or anything if filter_count is 0
  kHeadFields
};

// Fields of a line of `rounds`.
enum RoundField {
  kChunkBegin,  // chunks, 16 bytes of channels, to bring to shared memory; none: those are kept
  kChunkCount,
  kSlotBegin,  // chunks to make of them by gathering single channels; none: used as they are
  kSlotCount,
  kRoundFields
};

// Fields of a line of `lists`.
enum ListField {
  kListBegin = 0,              // of each step list in the head's words; then the last one's end
  kListFragment = kLists + 1,  // the first one, from the head's first
  kListFields
};

// y = act(scale * conv(x, w) + shift + residual); dgrad is the same on the transposed Support.
struct Narrow {
  const void* x;         // [batch, image_h, image_w, C]
  void* y;               // [batch, OH, OW, F]
  const void* residual;  // strided as y, or null
  const void* slabs;     // packed weights, see `narrow_pack`
  const float* scale;    // [F] or null
  const float* shift;    // [F] or null

  const int32_t* classes;  // [class_count, kClassFields]
  const int32_t* heads;    // [class_count, parts, kHeadFields]
  const int32_t* rounds;   // [class_count, parts, round_count, kRoundFields]
  const int32_t* lists;    // [class_count, parts, round_count, warps_n, kListFields]
  const int32_t* words;
  const int32_t* chunks;  // which 16 bytes of a pixel each chunk is
  // [slots, 4]: eight places in the raw pixel, 16 bits each, 65535: zero; of float32 four, each
  // with 65535 behind it.
  const int32_t* slots;
  const int32_t* rows;  // [parts, warps_n * kWarpFilters]: filters in order, -1: none

  int64_t x_n, y_n;
  int32_t x_h, x_w, y_h, y_w;
  int32_t batch, image_h, image_w, channels;  // of x
  int32_t class_count, parts, round_count;
  int32_t tile_h, tile_w;    // pixels of a tile; at most warps_m * kWarpPixels together
  int32_t warps_m, warps_n;  // at most kMaxWarps together
  int32_t raw_pitch;         // from pixel to pixel of the raw halo tile, in 16 bytes, odd
  int32_t slot_pitch;        // of the gathered one; 0 if no round gathers
  int32_t halo_pixels;       // the most of any class
  int32_t max_words;         // the most of any head
  int32_t max_fragments;     // the same
  int32_t vector_stores;     // whether y (and residual) takes 16-byte accesses
  int32_t buffers;           // 1, or 2: the next halo tile is fetched while this one is computed
  int32_t resident;          // whether a head's weights stay in shared memory
  int32_t blocks;            // for each head; 0: as many as the device holds at once
  int32_t item;              // bytes of a number of x and y
  int32_t split;             // of float32: the sum of two TF32 numbers; else it is rounded to one
  int32_t tma;               // whether TMA brings the halos; else cp.async does
  std::array<int32_t, kMostMaps> box_h, box_w;  // the halo of each class, if it does
  Act act;
};

// Fields of a line of `heads` of wgrad, one for each part of the units.
enum WgradHeadField {
  kXChunkBegin,
  kXChunkCount,
  kXSlotBegin,
  kXSlotCount,
  kDyChunkBegin,
  kDyChunkCount,
  kDySlotBegin,
  kDySlotCount,
  kUnitBegin,
  kUnitCount,
  kWgradHeadFields
};

constexpr int kUnitSteps = 4;  // a unit is the gradient of 4 steps (16 columns each) ...
constexpr int kUnitTiles = 2;  // ... by 2 times 8 filters: 1024 numbers
constexpr int kWarpUnits = 2;  // units in one warp's registers
constexpr int kUnitValues = 1024;

// Fields of a line of `units`.
enum UnitField {
  kStepWord = 0,          // of each step
  kDyPlace = kUnitSteps,  // of each tile: the chunk of dy, or the slot; -1: none
  kUnitFields = kDyPlace + kUnitTiles
};

struct NarrowWgrad {
  const void* x;    // [batch, image_h, image_w, C]
  const void* dy;   // [batch, OH, OW, F]
  float* partials;  // [blocks, units, kUnitValues]

  const int32_t* geometry;  // [kClassFields], the class of fprop
  const int32_t* heads;     // [parts, kWgradHeadFields]
  const int32_t* units;     // [units, kUnitFields]
  const int32_t* chunks;    // as above, for both operands
  const int32_t* slots;     // as above

  int64_t x_n, y_n;
  int32_t x_h, x_w, y_h, y_w;
  int32_t batch, image_h, image_w;
  int32_t parts, unit_count;
  int32_t tile_h, tile_w;
  int32_t warps;
  int32_t x_pitch, x_slot_pitch, dy_pitch, dy_slot_pitch;
  int32_t halo_pixels;
  int32_t buffers;
  int32_t blocks;  // for each part: the number of partials
  int32_t tma;     // whether TMA brings the tiles; else cp.async does
  // If it does, for the tensor maps; else anything.
  int32_t channels, filters, dy_h, dy_w, halo_h, halo_w;
};

// Each returns null, or a sentence that says what is wrong. `stream` is a cudaStream_t.
const char* narrow_fprop(const Narrow& p, DType dtype, void* stream);
const char* narrow_wgrad(const NarrowWgrad& p, DType dtype, void* stream);

// dw[targets[i]] = the sum over splits, in order, of partials[split][i], where targets[i] >= 0;
// entries that no target names are zero.
const char* narrow_reduce(const float* partials, const int32_t* targets, void* dw, int64_t size,
                          int64_t dw_size, int32_t splits, DType dtype, void* stream);

// slabs[i] = w[source[i]], zero where the source is negative.
const char* narrow_pack(const void* w, DType w_dtype, const int32_t* source, void* slabs,
                        DType dtype, int64_t size, void* stream);

// The blocks that the current device holds at once for each head; 0: it holds none.
int64_t narrow_blocks(const Narrow& p, DType dtype);
int64_t narrow_wgrad_blocks(const NarrowWgrad& p, DType dtype);

// Why TMA can bring no halos, whatever the device; null if it can.
const char* narrow_tma_unsupported();

// Dynamic shared memory of one block, in bytes.
int64_t narrow_shared_bytes(const Narrow& p);
int64_t narrow_wgrad_shared_bytes(const NarrowWgrad& p);

// The names of the kernels that are built, ended by null.
const char* const* narrow_kernels();

}  // namespace hetconv::cuda
