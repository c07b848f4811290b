// SPDX-License-Identifier: Apache-2.0
// fprop and dgrad for narrow groups, with halos that cp.async brings, and the launchers of both
// ways; narrow_kernel.h has the program.
#include "narrow_kernel.h"

namespace hetconv::cuda {
namespace {

using narrow::kResidentBlocks;
using narrow::kThreads;
using narrow::Layout;
using narrow::threads_of;

template <class T, bool kResident, class Activation>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kResident, Activation>)
    narrow_fprop_kernel(Narrow p) {
  narrow::compute<T, kResident, Activation>(p);
}

struct Kernels {
  static constexpr bool kSingle = true;  // there are some for float32
  template <class T, bool kResident, class Activation> static auto of() {
    return narrow_fprop_kernel<T, kResident, Activation>;
  }
};

}  // namespace

int64_t narrow_shared_bytes(const Narrow& p) { return Layout(p, p.tma).total; }

int64_t narrow_blocks(const Narrow& p, DType dtype) {
  const int64_t held = p.tma ? narrow::max_resident_tma(p, dtype)
                             : max_resident_blocks(narrow::pick<Kernels>(p, dtype), threads_of(p),
                                                   narrow_shared_bytes(p));
  return blocks_of_head(held, int64_t(p.class_count) * p.parts);
}

const char* narrow_fprop(const Narrow& p, DType dtype, void* stream) {
  const auto kernel = narrow::pick<Kernels>(p, dtype);
  if (!kernel) return "the narrow kernels are built for float32, bf16 and fp16 only";
  if (p.item != (dtype == DType::f32 ? 4 : 2)) return "the numbers' size is not that of their type";
  if (p.warps_m < 1 || p.warps_n < 1 || p.warps_m * p.warps_n > kMaxWarps)
    return "a block has 1 to 8 warps";
  if (p.tile_h * p.tile_w > p.warps_m * kWarpPixels) return "the tile has more pixels than rows";
  if (p.buffers != 1 && p.buffers != 2) return "there are one or two buffers";
  const int64_t blocks = p.blocks ? p.blocks : narrow_blocks(p, dtype);
  if (blocks < 1) return "the device cannot hold a block of this shape";
  if (p.tma) return narrow::launch_tma(p, dtype, blocks, stream);
  return launch(kernel, p, blocks, int64_t(p.class_count) * p.parts, threads_of(p),
                narrow_shared_bytes(p), stream);
}

}  // namespace hetconv::cuda
