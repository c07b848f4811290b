// SPDX-License-Identifier: Apache-2.0
// A probe: how fast wgmma reads an operand without swizzling whose rows of 128 bytes begin at any
// 16 bytes. PTX allows it; nobody has published how fast it is, and the wide kernel rests on it.
#include "hopper.h"
#include "wide.h"

namespace hetconv::cuda {
namespace wide {
namespace {

constexpr int kPixels = 256, kThreads = kWarpgroups * 128;

__global__ void __launch_bounds__(kThreads, 1) wide_rate_kernel(WideRate p) {
#ifdef HETCONV_WGMMA
  const uint32_t shared = shared_begin();
  const int halo_bytes = kChunks * p.plane_pitch * 16;
  const uint32_t one = narrow_pair<Bfloat>(1.0f, 1.0f);
  for (int at = int(threadIdx.x) * 16; at < halo_bytes + kWarpgroups * kSlabBytes;
       at += kThreads * 16)
    store_shared128(shared + at, Quad{{one, one, one, one}});
  fence_async();
  barrier();
  const int group = warp_index() / 4;
  const uint32_t slab = shared + halo_bytes + group * kSlabBytes;
  float acc[kPixels / 2] = {};
  const int64_t begin = clocks();
  for (int s = 0, row = 0, col = 0; s < p.steps; ++s) {
    const uint64_t a = operand(slab, 64, 8);
    const uint64_t x = operand(shared + (row * p.row_pitch + col) * 16, uint32_t(p.plane_pitch),
                               uint32_t(p.row_pitch));
    hold_registers(acc);
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      product<Bfloat, kPixels>(acc, a + k * (kSlabBytes / 4 / 16), x + k * 2 * p.plane_pitch);
    products_commit();
    products_wait<1>();
    hold_registers(acc);
    if (++col == p.taps) {
      col = 0;
      if (++row == p.taps) row = 0;
    }
  }
  products_wait<0>();
  hold_registers(acc);
  const int64_t end = clocks();
  float least = acc[0];
#pragma unroll
  for (int i = 1; i < kPixels / 2; ++i) least = acc[i] == acc[0] ? least : -1.0f;
  if (threadIdx.x % 128 == 0) {
    p.clocks[blockIdx.x * kWarpgroups + group] = end - begin;
    p.values[blockIdx.x * kWarpgroups + group] = least;
  }
#endif
}

}  // namespace
}  // namespace wide

const char* wide_rate(const WideRate& p, void* stream) {
  using namespace wide;
  if (capability() != 90) return "the probe is built for compute capability 9.0 only";
  if (p.taps < 1 || p.row_pitch < kColumns + p.taps - 1) return "rows are shorter than taps reach";
  const int rows = kPixels / kColumns + p.taps - 1;
  const int64_t shared = int64_t(kChunks) * p.plane_pitch * 16 + kWarpgroups * kSlabBytes;
  if (p.plane_pitch < rows * p.row_pitch) return "planes are shorter than taps reach";
  if (shared > kMostShared) return "the planes do not fit into shared memory";
  return launch_clustered(wide_rate_kernel, p, p.blocks, kThreads, shared, 1, stream);
}

}  // namespace hetconv::cuda
