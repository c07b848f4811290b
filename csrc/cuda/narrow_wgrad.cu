// SPDX-License-Identifier: Apache-2.0
// wgrad for narrow groups, with tiles that cp.async brings, and the launchers of both ways;
// narrow_wgrad_kernel.h has the program.
#include "narrow_wgrad_kernel.h"

namespace hetconv::cuda {
namespace {

using wgrad::kThreads;
using wgrad::Layout;

template <class T>
__global__ void __launch_bounds__(kThreads, 1) narrow_wgrad_kernel(NarrowWgrad p) {
  wgrad::compute<T>(p);
}

using Kernel = void (*)(NarrowWgrad);

Kernel pick(DType dtype) {
  return pick_by_type(dtype,
                      [](auto type) -> Kernel { return narrow_wgrad_kernel<decltype(type)>; });
}

}  // namespace

int64_t narrow_wgrad_shared_bytes(const NarrowWgrad& p) { return Layout(p, p.tma).total; }

int64_t narrow_wgrad_blocks(const NarrowWgrad& p, DType dtype) {
  const int64_t held =
      p.tma ? wgrad::max_resident_tma(p, dtype)
            : max_resident_blocks(pick(dtype), p.warps * 32, narrow_wgrad_shared_bytes(p));
  return blocks_of_head(held, p.parts);
}

const char* narrow_wgrad(const NarrowWgrad& p, DType dtype, void* stream) {
  const Kernel kernel = pick(dtype);
  if (!kernel) return "wgrad of narrow groups is built for bf16 and fp16 only";
  if (p.warps < 1 || p.warps > kMaxWarps) return "a block has 1 to 8 warps";
  if (p.tile_h * p.tile_w % 16) return "a tile of wgrad has a multiple of 16 pixels";
  if (p.buffers != 1 && p.buffers != 2) return "there are one or two buffers";
  if (p.blocks < 1) return "wgrad needs its number of blocks, which its partials have";
  if (p.tma) return wgrad::launch_tma(p, dtype, stream);
  return launch(kernel, p, p.blocks, p.parts, p.warps * 32, narrow_wgrad_shared_bytes(p), stream);
}

}  // namespace hetconv::cuda
