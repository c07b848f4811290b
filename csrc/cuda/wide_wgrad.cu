// SPDX-License-Identifier: Apache-2.0
// wgrad for wide groups on Hopper: tiles of dy and of x with its halo are brought to shared memory
// once, and the gradients of all taps are computed from them by wgmma, filters by channels.
//
// A block of threads is persistent: one warpgroup loads tiles by cp.async, two multiply, each by
// products of its own. dy comes to registers (ldmatrix) once for all products of a warpgroup, x is
// read by the matrix unit where it lies. mbarriers tell which tile is full and which is empty.
#include "wide_wgrad.h"

#include "hopper.h"
#include "launchers.h"
#include "wide_planes.h"
#include "wide_work.h"

namespace hetconv::cuda {
namespace wide {
namespace {

// 128 * (48 + 2 * 232) of 65536; of these 232 the gradients take 192.
constexpr int kLoadRegisters = 48, kMultiplyRegisters = 232;

// Where things lie in shared memory, in bytes from its begin.
struct WgradLayout {
  int x, block, stage, barriers, total;

  __host__ __device__ explicit WgradLayout(const WideWgrad& p) {
    x = p.dy_pitch * kChunks * 16;
    block = p.x_pitch * kChunks * 16;
    stage = x + p.most_blocks * block;
    barriers = p.stages * stage;
    total = barriers + 2 * p.stages * 8;
  }
};

// The tiles of a block of threads, one after another.
struct Tiles {
  int count, tiles_h, tiles_w, images, rows;
  int image, row, col;

  __device__ explicit Tiles(const WideWgrad& p)
      : tiles_h(load_table(p.classes + kTilesH)),
        tiles_w(load_table(p.classes + kTilesW)),
        images(load_table(p.classes + kImages)),
        rows(p.tile_rows) {
    count = (p.batch + images - 1) / images * tiles_h * tiles_w;
  }
  __device__ void find(int index) {
    const int stack = index / (tiles_h * tiles_w), place = index - stack * tiles_h * tiles_w;
    image = stack * images;
    row = place / tiles_w * rows;
    col = place % tiles_w * kColumns;
  }
};

// The producers: all threads of a warpgroup copy a part of each plane.
__device__ void load_tiles(const WideWgrad& p, uint32_t shared, const WgradLayout& at, Ring ring,
                           const int32_t* job, int split) {
  const int thread = int(threadIdx.x);
  const Planes dy{p.dy, p.dy_n, p.dy_h, p.dy_w, p.batch, p.out_h, p.out_w, p.dy_pitch};
  const Planes x{p.x, p.x_n, p.x_h, p.x_w, p.batch, p.image_h, p.image_w, p.x_pitch};
  const int32_t* first = p.blocks + load_table(job + kJobBegin) * kWgradBlockFields;
  const int count = load_table(job + kJobCount);
  Tiles tiles(p);
  for (int index = split; index < tiles.count; index += p.splits, ring.advance()) {
    tiles.find(index);
    ring.wait_emptied();
    uint32_t to = shared + ring.at * at.stage;
    dy.copy<kGroupThreads>(p.classes + kClassFields, job + kDyChunk, p.classes + 2 * kClassFields,
                           tiles.image, tiles.row, tiles.col, to, thread);
    to += at.x;
    const int32_t* block = first;
    for (int b = 0; b < count; ++b, block += kWgradBlockFields, to += at.block)
      x.copy<kGroupThreads>(p.classes, block + kXChunk, block + kXUnread, tiles.image, tiles.row,
                            tiles.col, to, thread);
    copy_arrive(ring.filled());
  }
  copy_commit();
  copy_wait<0>();  // no thread ends before its copies
}

// The consumers.
template <class T, int kProducts>
__device__ void multiply_tiles(const WideWgrad& p, uint32_t shared, const WgradLayout& at,
                               Ring ring, int job, int split, int group) {
  const int thread = int(threadIdx.x) % kGroupThreads, lane = thread % 32, warp = thread / 32;
  const int32_t* places = p.places + (job * kWarpgroups + group) * kProducts;
  uint32_t place[kProducts];
#pragma unroll
  for (int q = 0; q < kProducts; ++q) {
    const int found = load_table(places + q);
    place[q] = uint32_t(found < 0 ? ~found : found) * 16 + at.x;
  }
  float acc[kProducts][32] = {};
  const uint32_t line =
      uint32_t(load_table(p.classes + kLoadH) * load_table(p.classes + kRowPitch));
  const int steps = p.tile_rows / 2;  // of sixteen pixels, eight of each of two rows
  // A fragment of dy: matrix m is eight pixels of row m / 2 by eight filters, transposed.
  const uint32_t own =
      uint32_t((2 * warp + lane / 8 % 2) * p.dy_pitch + lane / 16 * 8 + lane % 8) * 16;
  Tiles tiles(p);
  for (int index = split; index < tiles.count; index += p.splits, ring.advance()) {
    ring.wait_filled();
    fence_async();  // here, as those who copied are further on already
    const uint32_t stage = shared + ring.at * at.stage, dy = stage + own;
    // The products of a step, while what the next one needs of dy comes to other registers.
    auto turn = [&](const Quad& now, Quad& next, int step) {
      const uint32_t x = stage + uint32_t(step) * line * 32;
      products_begin();
#pragma unroll
      for (int q = 0; q < kProducts; ++q)
        product_of_registers<T, 64>(acc[q], now, operand(x + place[q], line, uint32_t(p.x_pitch)));
      products_commit();
      products_wait<1>();  // those that read the other registers
      next = load_matrices_transposed(dy + uint32_t(step + 1 < steps ? step + 1 : step) * 256);
    };
    Quad even = load_matrices_transposed(dy), odd;
    int step = 0;
    for (; step + 1 < steps; step += 2) {
      turn(even, odd, step);
      turn(odd, even, step + 1);
    }
    if (step < steps) turn(even, odd, step);
    products_wait<0>();
#pragma unroll
    for (int q = 0; q < kProducts; ++q) hold_registers(acc[q]);
    warp_barrier();  // each lane has read dy by itself
    if (lane == 0) mbarrier_arrive(ring.emptied());
  }
  const int64_t first = ((int64_t(split) * p.job_count + job) * kWarpgroups + group) * kProducts;
#pragma unroll
  for (int q = 0; q < kProducts; ++q) {
    if (load_table(places + q) < 0) continue;
    float* to = p.partials + (first + q) * kProductValues + thread * 4;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float v[4] = {acc[q][4 * n], acc[q][4 * n + 1], acc[q][4 * n + 2], acc[q][4 * n + 3]};
      store128(to + n * kGroupThreads * 4, v);
    }
  }
}

template <class T, int kProducts>
__global__ void __launch_bounds__(kThreads, 1) wide_wgrad_kernel(WideWgrad p) {
#ifdef HETCONV_WGMMA
  const WgradLayout at(p);
  const uint32_t shared = shared_begin();
  const Ring ring(shared + at.barriers, shared + at.barriers, p.stages);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(ring.full + i * 8, kGroupThreads);
      mbarrier_init(ring.empty + i * 8, 4 * kWarpgroups);
    }
    mbarrier_init_done();
  }
  barrier();
  // Jobs of the same tiles follow each other, so that these are read from the L2 cache.
  const int split = int(blockIdx.x) / p.job_count, job = int(blockIdx.x) - split * p.job_count;
  const int warp = warp_index();
  if (warp < 4) {
    fewer_registers<kLoadRegisters>();
    load_tiles(p, shared, at, ring, p.jobs + job * kJobFields, split);
  } else {
    more_registers<kMultiplyRegisters>();
    multiply_tiles<T, kProducts>(p, shared, at, ring, job, split, warp / 4 - 1);
  }
#endif
}

using Kernel = void (*)(WideWgrad);

template <class T> Kernel pick(int products) {
  switch (products) {
    case 2:
      return wide_wgrad_kernel<T, 2>;
    case 4:
      return wide_wgrad_kernel<T, 4>;
    case 5:
      return wide_wgrad_kernel<T, 5>;
    case 6:
      return wide_wgrad_kernel<T, 6>;
    default:
      return nullptr;
  }
}

Kernel pick(const WideWgrad& p, DType dtype) {
  return pick_by_type(dtype, [&](auto type) { return pick<decltype(type)>(p.products); });
}

}  // namespace
}  // namespace wide

int64_t wide_wgrad_shared_bytes(const WideWgrad& p) { return wide::WgradLayout(p).total; }

int64_t wide_wgrad_blocks(const WideWgrad& p, DType dtype) {
  const wide::Kernel kernel = wide::pick(p, dtype);
  if (!kernel || capability() != 90) return 0;
  return max_resident_clustered(kernel, wide::kThreads, wide_wgrad_shared_bytes(p), 1);
}

const char* wide_wgrad(const WideWgrad& p, DType dtype, void* stream) {
  const wide::Kernel kernel = wide::pick(p, dtype);
  if (!kernel) return "wgrad of wide groups is built for bf16 and fp16, 2, 4, 5 or 6 products";
  if (capability() != 90) return "the wide kernels are built for compute capability 9.0 only";
  if (p.stages < 1 || p.splits < 1) return "there are one or more stages and splits";
  if (p.tile_rows < 2 || p.tile_rows % 2) return "a tile has a multiple of two rows";
  if (p.x_pitch % 8 != 1 || p.dy_pitch % 8 != 1)
    return "a plane pitch is one more than a multiple of eight";
  if (wide_wgrad_shared_bytes(p) > wide::kMostShared)
    return "the tiles do not fit into shared memory";
  return launch_clustered(kernel, p, int64_t(p.splits) * p.job_count, wide::kThreads,
                          wide_wgrad_shared_bytes(p), 1, stream);
}

}  // namespace hetconv::cuda
