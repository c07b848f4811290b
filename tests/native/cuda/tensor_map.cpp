// SPDX-License-Identifier: Apache-2.0
#include "tensor_map.h"

#include <cstdio>
#include <cstring>

#include "machine.h"

namespace hetconv::host {

namespace {

constexpr cuuint64_t kMagic = 0x686574636F6E7678;  // of a map that was encoded
constexpr int kRank = 4;
constexpr cuuint64_t kFlag = cuuint64_t(1) << 21;

// What the opaque words of a map hold here.
struct Fields {
  cuuint64_t magic;
  cuuint64_t flags;  // which faulty drivers set, and what is encoded has to mend for small tensors
  const char* base;
  cuuint64_t sizes[kRank], strides[kRank - 1];
  cuuint32_t box[kRank];
  int32_t bytes;  // of a number
};
static_assert(sizeof(Fields) <= sizeof(CUtensorMap));

// What is wrong with the arguments; null if nothing is.
const char* refusal(const void* map, CUtensorMapDataType type, cuuint32_t rank, const void* base,
                    const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                    const cuuint32_t* each, CUtensorMapInterleave interleave,
                    CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  const cuuint64_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2 : 1;
  if (uintptr_t(map) % 64) return "the map is not aligned to 64 bytes";
  if (rank != kRank) return "only maps of four dimensions are played here";
  if (interleave || swizzle || fill) return "only plain boxes are played here";
  if (uintptr_t(base) % 16) return "the tensor is not aligned to 16 bytes";
  for (int i = 0; i < kRank; ++i) {
    if (sizes[i] < 1 || sizes[i] > uint64_t(1) << 32) return "a dimension is not 1 to 2^32";
    if (box[i] < 1 || box[i] > 256) return "a box has not 1 to 256 places along a dimension";
    if (each[i] != 1) return "only boxes of all places are played here";
  }
  if (box[0] * bytes % 16) return "a box's lines are no multiple of 16 bytes";
  cuuint64_t least = sizes[0] * bytes;
  for (int i = 0; i + 1 < kRank; ++i) {
    if (strides[i] % 16) return "a stride is no multiple of 16 bytes";
    if (strides[i] >= uint64_t(1) << 40) return "a stride is not below 2^40 bytes";
    if (strides[i] < least) return "a dimension overlaps the one before";
    least = strides[i] * sizes[i + 1];
  }
  return nullptr;
}

}  // namespace

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* each, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  if (const char* wrong =
          refusal(map, type, rank, base, sizes, strides, box, each, interleave, swizzle, fill)) {
    std::fprintf(stderr, "tensor map: %s\n", wrong);
    return CUDA_ERROR_INVALID_VALUE;
  }
  Fields own{kMagic, kFlag, static_cast<const char*>(base), {}, {}, {}, 0};
  own.bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2 : 1;
  std::memcpy(own.sizes, sizes, sizeof own.sizes);
  std::memcpy(own.strides, strides, sizeof own.strides);
  std::memcpy(own.box, box, sizeof own.box);
  std::memset(map->opaque, 0, sizeof map->opaque);
  std::memcpy(map->opaque, &own, sizeof own);
  return CUDA_SUCCESS;
}

std::vector<char> box_of(const void* map, const int (&corner)[4]) {
  Fields own;
  if (uintptr_t(map) % 64) fail("a tensor map at %p, which is not aligned to 64", map);
  std::memcpy(&own, map, sizeof own);
  if (own.magic != kMagic) fail("a tensor map that nobody has encoded");
  cuuint64_t last = (own.sizes[0] - 1) * own.bytes;
  for (int i = 0; i + 1 < kRank; ++i) last += (own.sizes[i + 1] - 1) * own.strides[i];
  if (bool(own.flags & kFlag) != (last + 1 >= 128 * 1024))
    fail("a tensor map of %llu bytes that was not mended as it should be",
         static_cast<unsigned long long>(last + 1));
  const int64_t number = own.bytes, line = own.box[0] * number;
  std::vector<char> found(size_t(line) * own.box[1] * own.box[2] * own.box[3], 0);
  char* to = found.data();
  for (int64_t n = 0; n < own.box[3]; ++n)
    for (int64_t row = 0; row < own.box[2]; ++row)
      for (int64_t col = 0; col < own.box[1]; ++col, to += line) {
        const int64_t at[3] = {corner[1] + col, corner[2] + row, corner[3] + n};
        const char* from = own.base;
        bool inside = true;
        for (int i = 0; i < 3; ++i) {
          inside = inside && at[i] >= 0 && at[i] < int64_t(own.sizes[i + 1]);
          from += at[i] * int64_t(own.strides[i]);
        }
        if (!inside) continue;
        for (int64_t c = 0; c < own.box[0]; ++c) {
          const int64_t channel = corner[0] + c;
          if (channel < 0 || channel >= int64_t(own.sizes[0])) continue;
          std::memcpy(to + c * number, from + channel * number, size_t(number));
        }
      }
  return found;
}

}  // namespace hetconv::host
