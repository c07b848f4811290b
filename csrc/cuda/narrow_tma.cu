// SPDX-License-Identifier: Apache-2.0
// fprop, dgrad and wgrad for narrow groups, with tiles that TMA brings, from compute capability 9.0
// on; narrow_kernel.h and narrow_wgrad_kernel.h have the programs.
#include "narrow_kernel.h"
#include "narrow_wgrad_kernel.h"

namespace hetconv::cuda {
namespace narrow {
namespace {

template <class T, bool kResident, class Activation>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kResident, Activation>)
    narrow_tma_kernel(const __grid_constant__ NarrowTma p) {
#ifdef HETCONV_BULK
  compute<T, kResident, Activation>(p);
#endif
}

struct Kernels {
  static constexpr bool kSingle = false;  // there are none for float32
  template <class T, bool kResident, class Activation> static auto of() {
    return narrow_tma_kernel<T, kResident, Activation>;
  }
};

}  // namespace

int64_t max_resident_tma(const Narrow& p, DType dtype) {
  if (tma_unsupported()) return 0;
  return max_resident_blocks(pick<Kernels>(p, dtype), threads_of(p), Layout(p, true).total);
}

const char* launch_tma(const Narrow& p, DType dtype, int64_t blocks, void* stream) {
  if (const char* reason = tma_unsupported()) return reason;
  if (p.item != 2) return "TMA brings halos of bf16 and fp16 only";
  if (p.class_count > kMostMaps) return "there are more classes than tensor maps";
  NarrowTma own{p, {}};
  for (int i = 0; i < p.class_count; ++i) {
    const TmaBox of{p.x,   p.channels, p.image_w,       p.image_h,  p.batch,   p.x_w,
                    p.x_h, p.x_n,      p.raw_pitch * 8, p.box_w[i], p.box_h[i]};
    if (const char* error = encode(own.maps[i], of)) return error;
  }
  return launch_bulk(pick<Kernels>(p, dtype), own, blocks, int64_t(p.class_count) * p.parts,
                     threads_of(p), Layout(p, true).total, stream);
}

}  // namespace narrow

namespace wgrad {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    wgrad_tma_kernel(const __grid_constant__ WgradTma p) {
#ifdef HETCONV_BULK
  compute<T>(p);
#endif
}

using Kernel = void (*)(WgradTma);

Kernel pick(DType dtype) {
  return pick_by_type(dtype, [](auto type) -> Kernel { return wgrad_tma_kernel<decltype(type)>; });
}

}  // namespace

int64_t max_resident_tma(const NarrowWgrad& p, DType dtype) {
  if (tma_unsupported()) return 0;
  return max_resident_blocks(pick(dtype), p.warps * 32, Layout(p, true).total);
}

const char* launch_tma(const NarrowWgrad& p, DType dtype, void* stream) {
  if (const char* reason = tma_unsupported()) return reason;
  WgradTma own{p, {}, {}};
  const TmaBox x{p.x,   p.channels, p.image_w,     p.image_h, p.batch, p.x_w,
                 p.x_h, p.x_n,      p.x_pitch * 8, p.halo_w,  p.halo_h};
  const TmaBox dy{p.dy,  p.filters, p.dy_w,         p.dy_h,   p.batch, p.y_w,
                  p.y_h, p.y_n,     p.dy_pitch * 8, p.tile_w, p.tile_h};
  if (const char* error = encode(own.x_map, x)) return error;
  if (const char* error = encode(own.dy_map, dy)) return error;
  return launch_bulk(pick(dtype), own, p.blocks, p.parts, p.warps * 32, Layout(p, true).total,
                     stream);
}

}  // namespace wgrad

const char* narrow_tma_unsupported() { return no_encoder(); }

}  // namespace hetconv::cuda
