// SPDX-License-Identifier: Apache-2.0
// Tiles as boxes that TMA cuts out of a tensor: which box, and where it may lie.
#pragma once
#include <cstdio>

#include "mbarrier.h"
#include "narrow.h"

namespace hetconv::cuda {

// Of the places in shared memory that boxes are copied to, in bytes.
constexpr int kTmaAlign = 128;
// Which tensors need their maps mended, by their bytes, and of which drivers.
constexpr cuuint64_t kSmallTensor = 128 * 1024;
constexpr int kFaultyDriver = 13010;

// The parameter of a kernel whose halos TMA brings: a tensor map for each class of pixels.
struct NarrowTma : Narrow {
  TensorMap maps[kMostMaps];
};

// The same of wgrad, for both operands.
struct WgradTma : NarrowWgrad {
  TensorMap x_map, dy_map;
};
static_assert(alignof(NarrowTma) % 64 == 0 && alignof(WgradTma) % 64 == 0);

// Images of 16-bit numbers in channels_last order, and the boxes that are cut out of them.
struct TmaBox {
  const void* base;
  int64_t channels, cols, rows, images;
  int64_t col_stride, row_stride, image_stride;  // in elements
  int box_channels, box_cols, box_rows;
};

// Makes the tensor map of some boxes; returns null, or a sentence that says what is wrong.
inline const char* encode(TensorMap& map, const TmaBox& of) {
  const TensorMapEncoder encoder = tensor_map_encoder();
  if (!encoder) return "the driver encodes no tensor maps";
  // Numbers are named by their size: only bits are copied.
  constexpr int kBytes = 2;
  const cuuint64_t sizes[4] = {cuuint64_t(of.channels), cuuint64_t(of.cols), cuuint64_t(of.rows),
                               cuuint64_t(of.images)};
  cuuint64_t strides[3] = {cuuint64_t(of.col_stride * kBytes), cuuint64_t(of.row_stride * kBytes),
                           cuuint64_t(of.image_stride * kBytes)};
  // The stride of an axis of one place, which has none, may not be zero.
  cuuint64_t dense = sizes[0] * kBytes;
  for (int i = 0; i < 3; ++i) {
    if (sizes[i + 1] == 1) strides[i] = dense;
    dense = strides[i] * sizes[i + 1];
  }
  const cuuint32_t box[4] = {cuuint32_t(of.box_channels), cuuint32_t(of.box_cols),
                             cuuint32_t(of.box_rows), 1};
  const cuuint32_t each[4] = {1, 1, 1, 1};
  const auto encoded = [&] {
    return encoder(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(of.base), sizes,
                   strides, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encoded();
  if (result == CUDA_ERROR_INVALID_CONTEXT && bind_context()) result = encoded();
  if (result == CUDA_SUCCESS) {
    cuuint64_t last = (sizes[0] - 1) * kBytes;
    for (int i = 0; i < 3; ++i) last += (sizes[i + 1] - 1) * strides[i];
    // Drivers up to 13.1 encode small tensors wrongly: a bit is to be cleared (CUTLASS, commit
    // b7ecaa6; Triton does it too).
    if (last + 1 < kSmallTensor && driver_version() <= kFaultyDriver)
      map.opaque[1] &= ~(cuuint64_t(1) << 21);
    return nullptr;
  }
  static thread_local char text[96];
  std::snprintf(text, sizeof text, "the driver refuses a tensor map of these operands, error %d",
                int(result));
  return text;
}

// Why no boxes can be brought: by the driver, and on the current device; null if they can.
inline const char* no_encoder() {
  return tensor_map_encoder() ? nullptr : "the driver encodes no tensor maps";
}
inline const char* tma_unsupported() {
  return capability() < 90 ? "TMA came with compute capability 9.0" : no_encoder();
}

}  // namespace hetconv::cuda
