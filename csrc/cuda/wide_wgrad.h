// SPDX-License-Identifier: Apache-2.0
// Launcher of wgrad for wide groups on Hopper, compute capability 9.0. Plain C++: no CUDA, no
// torch.
//
// A tile of pixels, eight columns wide, of 64 filters of dy and with its halo of several blocks of
// 64 channels of x, is brought to shared memory as planes (see wide.h). There eight neighbouring
// pixels are eight k of a matrix operand, wherever they begin, so each tap is another address. A
// product is the gradient of 64 filters by 64 channels at one tap, summed over all pixels of the
// tiles of a block of threads in the registers of one warpgroup. Parts that blocks compute of the
// same products are added in order by `narrow_reduce`.
#pragma once
#include "wide.h"

namespace hetconv::cuda {

namespace wide {

constexpr int kProductValues = 64 * 64;
constexpr int kMostProducts = 6;  // of one warpgroup

// Fields of a line of `jobs`.
enum JobField {
  kDyChunk = 0,         // of eight, filter / 8; -1: zeros
  kJobBegin = kChunks,  // in `blocks`, which come to shared memory one after another
  kJobCount,
  kJobFields
};

// Fields of a line of the `blocks` of wgrad: as of fprop, but for the steps.
enum WgradBlockField {
  kXChunk = 0,
  kXUnread = kChunks,
  kWgradBlockFields = kXUnread + kUnreadFields
};

}  // namespace wide

struct WideWgrad {
  const void* x;   // [batch, image_h, image_w, C]; 16-byte aligned, strides multiples of 8
  const void* dy;  // [batch, out_h, out_w, F]; the same
  // [splits, jobs, kWarpgroups, products, kProductValues], of a product
  // [channel / 8: 8][filter / 16: 4][filter % 8: 8][channel % 8 / 2: 4][filter / 8 % 2][channel %
  // 2]; products that are none are not written. 16-byte aligned
  float* partials;

  // [2, wide::kClassFields], then wide::kUnreadFields zeros: how tiles read x, and dy, where a
  // pixel reads itself alone and nothing is left out. Both have the same tiles, images of a stack
  // and pitch of these.
  const int32_t* classes;
  const int32_t* jobs;    // [job_count, kJobFields]
  const int32_t* blocks;  // [.., kWgradBlockFields]
  // [job_count, kWarpgroups, products]: 16-byte units from the first plane of x to what the tile's
  // first pixel reads of the product's block at its tap; ~ of such a place: no product.
  const int32_t* places;

  int64_t x_n, dy_n;
  int32_t x_h, x_w, dy_h, dy_w;
  int32_t batch, image_h, image_w, out_h, out_w;
  int32_t job_count;
  int32_t products;     // of each warpgroup: 2, 4, 5 or 6
  int32_t tile_rows;    // of pixels, a multiple of two
  int32_t most_blocks;  // of a job
  // 16-byte units from a chunk's plane to the next, 1 more than a multiple of 8; of x at least
  // halo_h * row_pitch, of dy at least tile_rows * 8.
  int32_t x_pitch, dy_pitch;
  int32_t stages;  // tiles in shared memory: 1 or more, 2 to load ahead
  int32_t splits;  // blocks of threads of each job: each takes every splits-th tile
};

// Returns null, or a sentence that says what is wrong. `stream` is a cudaStream_t.
const char* wide_wgrad(const WideWgrad& p, DType dtype, void* stream);

// Whether the current device holds a block of threads; not but on compute capability 9.0.
int64_t wide_wgrad_blocks(const WideWgrad& p, DType dtype);

// Dynamic shared memory of one block, in bytes: stages * 128 * (dy_pitch + most_blocks * x_pitch),
// and 16 * stages for barriers.
int64_t wide_wgrad_shared_bytes(const WideWgrad& p);

}  // namespace hetconv::cuda
