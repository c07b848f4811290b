// SPDX-License-Identifier: Apache-2.0
// Launcher of the kernel for scattered groups: filters that keep single channels anywhere, as
// self-grouping makes them. Plain C++: no CUDA, no torch.
//
// A tile is the same `kRows` by `kCols` pixels of eight images. Its halo lies in shared memory as
// [pixel][slot][image of the eight], 16 bytes for each pixel of a slot, which is a channel. Eight
// slots of a pixel are, transposed, eight rows (images) by eight columns (channels) of a matrix
// operand, and each lane names one of them by its address: so any channels are taken, for nothing,
// and neither does a tap move anything within those 16 bytes.
//
// Everything irregular is decided before, by hetconv_kernels/backends/cuda/scattered_lowering.py,
// whose docstring gives the tables' meaning with an example. All pointers are device pointers, all
// strides count elements, activations are channels_last (stride 1 between channels).
#pragma once
#include <cstdint>

#include "narrow.h"

namespace hetconv::cuda {

namespace scattered {

constexpr int kImages = 8, kRows = 2, kCols = 7;  // of a tile
constexpr int kPixels = kImages * kRows * kCols;
constexpr int kStep = 16;     // channels of a step
constexpr int kSegment = 32;  // channels that are brought side by side
constexpr int kMostThreads = 512;

// Fields of a line of `parts`.
enum PartField {
  kBlockBegin,
  kBlockCount,   // one or more
  kTurns,        // the most jobs of a warp
  kColumnBegin,  // in `columns`
  kColumnCount,
  // Whether the filters of columns are eights that follow each other in y, each from a multiple of
  // eight.
  kEights,
  kPartFields
};

// Fields of a line of `blocks`: channels that are in shared memory at a time.
enum BlockField { kSegmentBegin, kSegmentCount, kBlockFields };

// Fields of a line of `segments`.
enum SegmentField {
  kSegmentIndex,  // the first channel / kSegment
  kSlot,          // of each channel, -1: it is not kept
  kSegmentFields = kSlot + kSegment
};

// Fields of a line of `jobs`.
enum JobField {
  kFragmentBegin,
  kColumn,  // of each filter, -1: there is none
  kJobFields = kColumn + 8
};

}  // namespace scattered

// y = act(scale * conv(x, w) + shift + residual), of strides and dilations of 1.
struct Scattered {
  const void* x;         // [batch, image_h, image_w, C]; 16-byte aligned, strides multiples of 8
  void* y;               // [batch, OH, OW, F]; the same
  const void* residual;  // strided and aligned as y, or null
  // Packed weights by `narrow_pack`, of each job [step][tap][lane: 32][4]: lane 4g + t has of
  // filter g the step's channels 2t, 2t + 1, 2t + 8, 2t + 9. A fragment is 128 elements, those of a
  // step and tap. 16-byte aligned
  const void* slabs;
  const float* scale;  // [F] or null
  const float* shift;  // [F] or null

  const int32_t* parts;     // [part_count, kPartFields]
  const int32_t* blocks;    // [.., kBlockFields]
  const int32_t* segments;  // [.., kSegmentFields]
  const int32_t* begins;    // [part_count, warps + 1]: the first job of each warp, and the end
  const int32_t* jobs;      // [.., kJobFields]
  // [jobs, most_blocks + 1]: the first step of a job in each block, and the end.
  const int32_t* spans;
  // [.., kStep]: slots of a step's channels.
  const int32_t* steps;
  const int32_t* columns;  // the filter of each column

  int64_t x_n, y_n;
  int32_t x_h, x_w, y_h, y_w;  // within an image 32 bits suffice for an element's bytes
  int32_t batch, channels, image_h, image_w;  // of x
  int32_t out_h, out_w;
  int32_t base_h, base_w;  // of x, what the first pixel of y reads at the first tap: -padding
  int32_t part_count, most_blocks;
  int32_t side;         // rows and columns of the kernel: 1 or 3
  int32_t warps;        // 8 or 16
  int32_t pixel_bytes;  // of shared memory: 16 for each slot of any block, a multiple of 128
  int32_t width;        // the most columns of any part, a multiple of eight
  Act act;
};

// Returns null, or a sentence that says what is wrong. `stream` is a cudaStream_t.
const char* scattered_fprop(const Scattered& p, DType dtype, void* stream);

// The blocks of threads that the current device holds at once; 0: none.
int64_t scattered_blocks(const Scattered& p, DType dtype);

// Dynamic shared memory of one block, in bytes: (side + 1) * (side + 6) * pixel_bytes, then
// kPixels * (width * 2 + 16) for results.
int64_t scattered_shared_bytes(const Scattered& p);

}  // namespace hetconv::cuda
