// SPDX-License-Identifier: Apache-2.0
// Launcher of the kernel for wide groups (64 filters and more) on Hopper, compute capability 9.0.
// Plain C++: no CUDA, no torch.
//
// A tile is 8 columns of pixels wide and `pixels` / 8 rows high. Its halo of 64 channels (a block)
// is brought to shared memory once, as planes: [chunk of eight channels][halo pixel], 16 bytes
// each. Eight neighbouring pixels of a halo row are then eight rows of a matrix operand wherever
// they begin, so every tap reads the same halo from another address. Filters come in segments of
// 64, two at a time (a pair), one for each of the two warpgroups that compute.
//
// Where 8 columns divide the images badly, rows are flattened instead: all pixels of the batch are
// one line, row after row, image after image, with the padding that two neighbours share between
// them, and a tile is `pixels` places of it that follow each other.
//
// Everything irregular is decided before, in tables. All pointers are device pointers, all strides
// count elements, activations are channels_last (stride 1 between channels).
#pragma once
#include <cstdint>

#include "narrow.h"

namespace hetconv::cuda {

namespace wide {

constexpr int kColumns = 8;     // of a tile
constexpr int kChunks = 8;      // of eight channels, of one block
constexpr int kFilters = 64;    // of a segment
constexpr int kSlab = 64 * 64;  // elements of a slab: the weights of one step
constexpr int kSlabBytes = kSlab * 2;
constexpr int kRuns = 8;           // of eight filters, of a segment
constexpr int kWarpgroups = 2;     // that compute, each one segment
constexpr int kStagedPixels = 32;  // on their way to y at a time, of each warpgroup
constexpr int kStagedPitch = 144;  // bytes from one to the next of them
constexpr int kMostShared = 227 * 1024;

// Fields of a line of `classes`.
//
// Tile row i of a class is row i % image_pitch of image i / image_pitch of the tile's stack, and
// a pixel of y where that is less than pixels_h (with one image: i, counted from the tile's first
// row). Halo row r is read by tile row i's tap number t (from the halo's begin) where
// r = i * load_h + t. In shared memory it belongs to image min(r / (image_pitch * load_h), images
// - 1) of the stack, and is row base_h + (tile's first row) * load_h + (r less that image's first
// halo row) of it; zeros where that is outside of [0, image_h). So images of a stack share the
// padding rows between them; for that,
//   image_pitch * load_h >= image_h - base_h, and
//   image_pitch * load_h >= (pixels_h - 1) * load_h + taps' reach + min(base_h, 0)
// where there are several. Halo column c is column base_w + (tile's first column) * load_w + c of
// the image and lies at place (c % load_w) * col_half + c / load_w of the halo row.
//
// With flattened rows there is one class, which reads neighbours (load 1) and has all images in one
// stack. Place q of the line is pixel (r, c) of image n where
//   q = (n * image_pitch + r) * flat_pitch + c,
// one of y where r < pixels_h and c < pixels_w, and x holds there row base_h + r, column
// base_w + c, zeros outside of the image. Tile t has places [t * pixels, (t + 1) * pixels), its
// halo begins at the same place and has halo_h rows of 8 of them, halo_w = row_pitch = 8. For that,
//   flat_pitch >= image_w - base_w, and flat_pitch >= pixels_w + taps' reach - 1 + min(base_w, 0),
// and image_pitch alike; and flat_pitch >= 8, image_pitch >= 4.
enum ClassField {
  kPixelsH,  // pixels that the class computes in one image
  kPixelsW,
  kTilesH,  // tiles that a stack of images is cut into; 1 if there are several images
  kTilesW,
  kImages,      // of a stack; 1 or more. Stacks end with the batch, the last one may be short
  kImagePitch,  // tile rows from an image to the next; at least pixels / 8 if there is but one
  kLoadH,       // 1 or 2: tile row i, tap t reads halo row i * load_h + t
  kLoadW,
  kBaseH,  // row of the image at halo row 0 of the first tile
  kBaseW,
  kHaloH,     // rows of the halo in shared memory: (pixels / 8 - 1) * load_h + taps' reach
  kHaloW,     // columns: 7 * load_w + taps' reach
  kRowPitch,  // 16-byte units from a halo row to the next of the same plane
  kColHalf,   // where columns of the second residue begin in a halo row; 0 if load_w is 1
  kStoreH,    // pixel (i, j) of an image is written to row first_h + i * store_h
  kStoreW,
  kFirstH,
  kFirstW,
  kClassFields
};

// Fields of a line of `heads`, one for each class and pair.
enum HeadField { kBlockBegin, kBlockCount, kHeadFields };

// Which steps of a block a warpgroup runs, none or more.
enum StepsField { kStepBegin, kStepCount, kStepsFields };

// How many rows and columns along the borders of a halo are read by no step of a block, or by no
// product of wgrad: they are not brought.
enum UnreadField { kTop, kBottom, kLeft, kRight, kUnreadFields };

// Fields of a line of `blocks`. Blocks follow each other in a head, and the steps of a warpgroup
// follow each other in a block.
enum BlockField {
  kChunk = 0,                                     // of eight, channel / 8; -1: zeros
  kSteps = kChunks,                               // of each warpgroup, StepsField
  kUnread = kSteps + kWarpgroups * kStepsFields,  // UnreadField
  kBlockFields = kUnread + kUnreadFields
};

}  // namespace wide

// y = act(scale * conv(x, w) + shift + residual); dgrad is the same on the transposed Support.
struct Wide {
  const void* x;         // [batch, image_h, image_w, C]; 16-byte aligned, strides multiples of 8
  void* y;               // [batch, OH, OW, F]; the same
  const void* residual;  // strided and aligned as y, or null
  // Packed weights by `narrow_pack`: 4096 elements for each line of `steps`,
  // [k of 16: 4][half of it: 2][filter / 8: 8][filter % 8: 8][channel % 8: 8].  16-byte aligned
  const void* slabs;
  const float* scale;  // [F] or null
  const float* shift;  // [F] or null

  const int32_t* classes;  // [class_count, kClassFields]
  const int32_t* heads;    // [class_count, pairs, kHeadFields]
  const int32_t* blocks;   // [.., kBlockFields]
  // 16-byte units from a plane's begin to what the first pixel of a tile reads at the step's tap.
  const int32_t* steps;
  // [pairs, kWarpgroups, kRuns]: the first of eight filters that follow each other in y, a multiple
  // of eight; -1: none, what is computed for them is not stored.
  const int32_t* rows;

  int64_t x_n, y_n;
  int32_t x_h, x_w, y_h, y_w;       // within an image 32 bits suffice for an element's bytes
  int32_t batch, image_h, image_w;  // of x
  int32_t class_count, pairs;
  int32_t pixels;       // of a tile: 64, 128, 224 or 256; of flattened rows 208 or 224
  int32_t flat_pitch;   // places from a row of an image to the next; 0: rows are not flattened
  int32_t plane_pitch;  // 16-byte units from a chunk's plane to the next, 1 more than a multiple of
                        // 8; every class's halo_h * row_pitch is at most that
  int32_t stages;       // halo blocks in shared memory: 1 or more, 2 to load ahead
  int32_t slots;        // slabs in shared memory, of each warpgroup
  int32_t cluster;      // blocks of threads that share slabs: 1 or 2
  int32_t grid;         // blocks of threads, a multiple of cluster; 0: as many as are held at once
  Act act;
};

// Each returns null, or a sentence that says what is wrong. `stream` is a cudaStream_t.
const char* wide_fprop(const Wide& p, DType dtype, void* stream);

// The blocks of threads that the current device holds at once; 0: none, or not compute
// capability 9.0.
int64_t wide_blocks(const Wide& p, DType dtype);

// Dynamic shared memory of one block, in bytes: stages * plane_pitch * 128, then slots * 2 *
// kSlabBytes, 4 * kStagedPixels * kStagedPitch for results, and 16 * (stages + 2 * slots + 1) for
// barriers.
int64_t wide_shared_bytes(const Wide& p);

// How fast the matrix unit reads operands that begin at any 16 bytes, which is what the kernel
// rests on: two warpgroups multiply as it does, by what never changes in shared memory, and nothing
// else.
struct WideRate {
  int64_t* clocks;  // [blocks, kWarpgroups]: of all steps
  float* values;    // [blocks, kWarpgroups]: 64 * steps, as all numbers are 1
  int32_t blocks;
  int32_t steps;        // of four products, of 64 x 256 by 16
  int32_t row_pitch;    // 16-byte units from a halo row to the next
  int32_t plane_pitch;  // 16-byte units from a chunk's plane to the next
  int32_t taps;         // 1: always the first; 3: along a row and a column, as of a kernel 3 x 3
};

// Runs only on compute capability 9.0.
const char* wide_rate(const WideRate& p, void* stream);

}  // namespace hetconv::cuda
