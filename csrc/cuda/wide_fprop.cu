// SPDX-License-Identifier: Apache-2.0
// fprop and dgrad for wide groups on Hopper: the halo of a tile is brought to shared memory once,
// and all taps are computed from it by wgmma, filters by pixels.
//
// A block is persistent and has one warpgroup that brings (three warps the halo, one thread the
// slabs of weights) and two that compute, each one segment of 64 filters on the same halo. In a
// cluster two blocks compute two tiles of the same filters, and each brings one half of every slab
// for both.
#include "epilogue.h"
#include "halo.h"
#include "hopper.h"
#include "wide.h"

namespace hetconv::cuda {
namespace wide {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kThreads = kGroupThreads * (1 + kWarpgroups);
constexpr int kHaloThreads = kGroupThreads - 32;
constexpr int kBringRegisters = 40, kComputeRegisters = 232;  // 128 * (40 + 2 * 232) of 65536
constexpr int kStagedBytes = kStagedPixels * kStagedPitch;
constexpr int kSlotBytes = kSlabBytes;

// Where things lie in shared memory, in bytes from its begin.
struct Layout {
  int halo, stage, slabs, staged, barriers, total;

  __host__ __device__ explicit Layout(const Wide& p) {
    halo = 0;
    stage = p.plane_pitch * kChunks * 16;
    slabs = halo + p.stages * stage;
    staged = slabs + p.slots * kWarpgroups * kSlotBytes;
    barriers = staged + kWarpgroups * 2 * kStagedBytes;
    total = barriers + 2 * (p.stages + kWarpgroups * p.slots) * 8;
  }
};

// A ring of places in shared memory, each with a barrier that says it is full and one for empty.
struct Ring {
  uint32_t full, empty;
  int count, at;
  uint32_t parity;

  __device__ Ring(uint32_t barriers, int count)
      : full(barriers), empty(barriers + count * 8), count(count), at(0), parity(0) {}
  __device__ uint32_t filled() const { return full + at * 8; }
  __device__ uint32_t emptied() const { return empty + at * 8; }
  __device__ void advance() {
    if (++at == count) at = 0, parity ^= 1;
  }
};

// The barriers in shared memory: of the halo's ring, then of the slabs' of each warpgroup.
struct Barriers {
  uint32_t begin;
  int stages, slots;

  __device__ Ring halo() const { return Ring(begin, stages); }
  __device__ Ring slabs(int group) const {
    return Ring(begin + (stages + group * slots) * 16, slots);
  }
};

// What a block computes at a time: a tile of a class, with the filters of a pair.
struct Item {
  const int32_t* table;  // the class
  const int32_t* head;
  int pair, tile;  // tile: among those of all classes
  int image, row, col;
  bool real;  // there is such a tile: the last cluster may have one too many

  // Pairs of the same tile follow each other, so that its halo is read from the L2 cache.
  __device__ bool find(const Wide& p, int index, int rank) {
    int first = 0;
    for (int kind = 0; kind < p.class_count; ++kind) {
      table = p.classes + kind * kClassFields;
      const int tiles_h = load_table(table + kTilesH), tiles_w = load_table(table + kTilesW);
      const int images = load_table(table + kImages);
      const int tiles = (p.batch + images - 1) / images * tiles_h * tiles_w;
      const int items = (tiles + p.cluster - 1) / p.cluster * p.pairs;
      if (index < items) {
        const int group = index / p.pairs, own = group * p.cluster + rank;
        pair = index - group * p.pairs;
        head = p.heads + (kind * p.pairs + pair) * kHeadFields;
        tile = first + own;
        real = own < tiles;
        const int stack = own / (tiles_h * tiles_w), place = own - stack * tiles_h * tiles_w;
        image = stack * images;
        row = place / tiles_w;
        col = (place - row * tiles_w) * kColumns;
        return true;
      }
      index -= items;
      first += tiles;
    }
    return false;
  }
};

// Brings the halo of blocks of channels, with three warps.
template <int kPixels> struct HaloBringer {
  const Wide& p;
  uint32_t shared;
  int stage_bytes, thread;

  // Starts copying one block for an item; every thread has one chunk of some pixels.
  __device__ void start(const Item& item, const int32_t* block, int stage) const {
    const int32_t* table = item.table;
    const int chunk = thread % kChunks, channels = load_table(block + kChunk + chunk);
    const int load_h = load_table(table + kLoadH), load_w = load_table(table + kLoadW);
    const int images = load_table(table + kImages);
    const int image_rows = load_table(table + kImagePitch) * load_h;
    const int cols = load_table(table + kHaloW), pixels = load_table(table + kHaloH) * cols;
    const int row_pitch = load_table(table + kRowPitch), half = load_table(table + kColHalf);
    const int top = load_table(table + kBaseH) + item.row * (kPixels / kColumns) * load_h;
    const int left = load_table(table + kBaseW) + item.col * load_w;
    const char* from = static_cast<const char*>(p.x) + int64_t(channels < 0 ? 0 : channels) * 16;
    const uint32_t to = shared + stage * stage_bytes + chunk * p.plane_pitch * 16;
    const Divider by_cols(cols), by_image(image_rows);
    for (int pixel = thread / kChunks; pixel < pixels; pixel += kHaloThreads / kChunks) {
      const int r = int(by_cols(pixel)), c = pixel - r * cols;
      const int nth = int(by_image(r)), part = nth < images ? nth : images - 1;
      const int y = top + r - part * image_rows, x = left + c, image = item.image + part;
      const bool valid = channels >= 0 && image < p.batch && uint32_t(y) < uint32_t(p.image_h) &&
                         uint32_t(x) < uint32_t(p.image_w);
      const int64_t offset = valid ? image * p.x_n + (y * p.x_h + x * p.x_w) : 0;
      const int place = load_w == 1 ? c : (c & 1) * half + (c >> 1);
      copy_async(to + (r * row_pitch + place) * 16, from + offset * 2, valid);
    }
    copy_commit();
  }

  // The copies are ordinary writes, and wgmma reads by another way: hence the fence by each writer
  // once its copies have ended, before it arrives.
  template <int kPending> __device__ void finish(uint32_t barrier) const {
    copy_wait<kPending>();
    fence_async();
    phase_arrive(barrier);
  }

  __device__ void run(Ring ring, int first, int step, int rank) const {
    uint32_t started = 0;  // the barrier of the block whose copies are on their way
    Item item;
    for (int index = first; item.find(p, index, rank); index += step) {
      const int32_t* block = p.blocks + load_table(item.head + kBlockBegin) * kBlockFields;
      const int count = load_table(item.head + kBlockCount);
      for (int b = 0; b < count; ++b, block += kBlockFields, ring.advance()) {
        if (started && !phase_ended(ring.emptied(), ring.parity ^ 1)) {
          finish<0>(started);
          started = 0;
        }
        phase_wait(ring.emptied(), ring.parity ^ 1);
        start(item, block, ring.at);
        if (started) finish<1>(started);
        started = ring.filled();
      }
    }
    if (started) finish<0>(started);
  }
};

// Brings the slabs of both warpgroups, step by step, with one thread.
__device__ void bring_slabs(const Wide& p, uint32_t slabs, const Barriers& barriers, int first,
                            int step, int rank) {
  const char* source = static_cast<const char*>(p.slabs);
  Ring rings[kWarpgroups] = {barriers.slabs(0), barriers.slabs(1)};
  Item item;
  for (int index = first; item.find(p, index, rank); index += step) {
    const int32_t* block = p.blocks + load_table(item.head + kBlockBegin) * kBlockFields;
    const int count = load_table(item.head + kBlockCount);
    for (int b = 0; b < count; ++b, block += kBlockFields) {
      int begin[kWarpgroups], steps[kWarpgroups];
#pragma unroll
      for (int w = 0; w < kWarpgroups; ++w) {
        begin[w] = load_table(block + kStepBegin + 2 * w);
        steps[w] = load_table(block + kStepCount + 2 * w);
      }
      for (int s = 0; s < steps[0] || s < steps[1]; ++s) {
#pragma unroll
        for (int w = 0; w < kWarpgroups; ++w) {
          if (s >= steps[w]) continue;
          Ring& ring = rings[w];
          phase_wait(ring.emptied(), ring.parity ^ 1);
          phase_expect(ring.filled(), kSlabBytes);
          const uint32_t to = slabs + (w * p.slots + ring.at) * kSlotBytes;
          const char* from = source + int64_t(begin[w] + s) * kSlabBytes;
          if (p.cluster == 1) {
            copy_bulk(to, from, kSlabBytes, ring.filled());
          } else {
            const int part = rank * (kSlabBytes / 2);
            copy_bulk_to(to + part, from + part, kSlabBytes / 2, ring.filled(), 3);
          }
          ring.advance();
        }
      }
    }
  }
}

// The rows and columns of a tile that are in y.
struct Pixels {
  int64_t corner;  // of the tile's first image in y, in elements
  int64_t image_step;
  int rows_left, cols_left, image_rows, images_left, step_h, step_w;
  Divider by_image;

  __device__ Pixels(const Wide& p, const Item& item, int tile_rows)
      : image_step(p.y_n),
        image_rows(load_table(item.table + kImagePitch)),
        by_image(image_rows) {
    const int32_t* table = item.table;
    const int row = item.row * tile_rows, images = load_table(table + kImages);
    const int store_h = load_table(table + kStoreH), store_w = load_table(table + kStoreW);
    images_left = p.batch - item.image < images ? p.batch - item.image : images;
    rows_left = item.real ? load_table(table + kPixelsH) - row : 0;
    cols_left = load_table(table + kPixelsW) - item.col;
    step_h = store_h * p.y_h;
    step_w = store_w * p.y_w;
    corner = item.image * p.y_n + int64_t(row * store_h + load_table(table + kFirstH)) * p.y_h +
             int64_t(item.col * store_w + load_table(table + kFirstW)) * p.y_w;
  }
  // Tile row i's first pixel in y, in elements; negative if the row is not in y.
  __device__ int64_t place(int i) const {
    const int image = int(by_image(i)), row = i - image * image_rows;
    if (image >= images_left || row >= rows_left) return -1;
    return corner + image * image_step + row * step_h;
  }
};

// Results of one item on their way from a warpgroup's registers to y, 32 pixels at a time.
template <class T, int kPixels, class Activation> struct Results {
  static constexpr int kTiles = kPixels / kColumns;
  const Wide& p;
  uint32_t staged;  // two buffers of this warpgroup
  int group, thread;

  __device__ void barrier() const { barrier_of(1 + group, kGroupThreads); }

  __device__ void send(const float (&acc)[kPixels / 2], const Item& item) const {
    const int lane = thread % 32, warp = thread / 32;
    const int32_t* rows = p.rows + (item.pair * kWarpgroups + group) * kRuns;
    const Pixels pixels(p, item, kTiles);
    const Activation activate(p.act);

    // In fragments, this lane has two filters.
    float scale[2] = {1.0f, 1.0f}, shift[2] = {0.0f, 0.0f}, sums[2] = {}, squares[2] = {};
    int filter[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int run = load_table(rows + warp * 2 + h);
      filter[h] = run < 0 ? -1 : run + lane / 4;
      if (filter[h] >= 0 && p.scale) scale[h] = p.scale[filter[h]];
      if (filter[h] >= 0 && p.shift) shift[h] = p.shift[filter[h]];
    }
    const uint32_t cell = staged + (lane / 16 * 8 + lane % 8) * kStagedPitch + warp * 32 +
                          lane / 8 % 2 * 16;
    const bool counted[2] = {lane % 4 * 2 < pixels.cols_left, lane % 4 * 2 + 1 < pixels.cols_left};

    // As 16-byte pieces, this thread has one run of eight filters, of pixels in one column.
    const int run = load_table(rows + thread % kRuns), column = thread / kRuns % kColumns;
    const bool mine = run >= 0 && column < pixels.cols_left;
    const int64_t along = int64_t(column) * pixels.step_w + run;
    const uint32_t piece = staged + thread / kRuns * kStagedPitch + thread % kRuns * 16;
    constexpr int kHalf = kStagedPixels / 2 * kStagedPitch;  // from the first to the second piece
    auto place = [&](int part, int second) {
      const int64_t at = pixels.place(part * 4 + second * 2 + thread / (kRuns * kColumns));
      return mine && at >= 0 ? at + along : -1;
    };
    const uint16_t* residual = static_cast<const uint16_t*>(p.residual);
    Quad old[2] = {};
    auto fetch = [&](int part) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int64_t at = place(part, second);
        old[second] = {};
        if (at >= 0) old[second] = load_table128(residual + at);
      }
    };
    if (residual) fetch(0);
    barrier();  // all have written out what was here before

#pragma unroll
    for (int part = 0; part < kTiles / 4; ++part) {
      const int buffer = part % 2 * kStagedBytes;
      if (residual) {
#pragma unroll
        for (int second = 0; second < 2; ++second)
          store_shared128(piece + buffer + second * kHalf, old[second]);
        if (part + 1 < kTiles / 4) fetch(part + 1);
        barrier();
      }
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        Quad made = {};
        const uint32_t at = cell + buffer + second * kHalf;
        if (residual) made = load_matrices_transposed(at);
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // matrices: filters by pixels of one tile row
          const int h = m % 2, row = part * 4 + second * 2 + m / 2;
          float v[2] = {acc[row * 4 + h * 2], acc[row * 4 + h * 2 + 1]};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[i] = v[i] * scale[h] + shift[h];
            if (residual) v[i] += widen<T>(i ? made.v[m] >> 16 : made.v[m] & 0xFFFF);
            v[i] = activate(v[i]);
          }
          if (p.sums && pixels.place(row) >= 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (!counted[i]) continue;
              sums[h] += v[i];
              squares[h] += v[i] * v[i];
            }
          }
          made.v[m] = narrow_pair<T>(v[0], v[1]);
        }
        store_matrices_transposed(at, made);
      }
      barrier();
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int64_t at = place(part, second);
        if (at >= 0)
          store128(static_cast<uint16_t*>(p.y) + at,
                   load_shared128(piece + buffer + second * kHalf));
      }
    }
    if (!p.sums) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = sum_of_four(sums[h]), square = sum_of_four(squares[h]);
      if (!item.real || filter[h] < 0 || lane % 4) continue;
      float* to = p.sums + int64_t(item.tile) * 2 * p.filters + filter[h];
      to[0] = sum;
      to[p.filters] = square;
    }
  }
};

// Computes one segment of every item.
template <class T, int kPixels, class Activation>
__device__ void compute(const Wide& p, uint32_t shared, const Layout& at, const Barriers& barriers,
                        int group, int first, int step, int rank) {
  const int thread = int(threadIdx.x) % kGroupThreads, lane = thread % 32;
  Ring halo = barriers.halo(), ring = barriers.slabs(group);
  const uint32_t slabs = shared + at.slabs + group * p.slots * kSlotBytes;
  const Results<T, kPixels, Activation> results{
      p, shared + at.staged + uint32_t(group) * 2 * kStagedBytes, group, thread};
  // Gives a slot back, to both blocks of a cluster as each brings half of what comes next.
  auto release = [&](uint32_t barrier) {
    if (lane) return;
    if (p.cluster == 1) {
      phase_arrive(barrier);
    } else {
      phase_arrive_at(barrier, 0);
      phase_arrive_at(barrier, 1);
    }
  };
  Item item;
  for (int index = first; item.find(p, index, rank); index += step) {
    const int32_t* block = p.blocks + load_table(item.head + kBlockBegin) * kBlockFields;
    const int count = load_table(item.head + kBlockCount);
    const uint32_t next_rows =
        uint32_t(load_table(item.table + kLoadH) * load_table(item.table + kRowPitch));
    float acc[kPixels / 2] = {};
    for (int b = 0; b < count; ++b, block += kBlockFields, halo.advance()) {
      const int32_t* windows = p.steps + load_table(block + kStepBegin + 2 * group);
      const int steps = load_table(block + kStepCount + 2 * group);
      const uint32_t planes = shared + at.halo + halo.at * at.stage;
      phase_wait(halo.filled(), halo.parity);
      uint32_t before = 0;  // the barrier of the slot of the step before
      for (int s = 0; s < steps; ++s, ring.advance()) {
        const uint32_t window = uint32_t(load_table(windows + s));
        const uint64_t a = operand(slabs + ring.at * kSlotBytes, 64, 8);
        const uint64_t x = operand(planes + window * 16, uint32_t(p.plane_pitch), next_rows);
        phase_wait(ring.filled(), ring.parity);
        hold_registers(acc);
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          product<T, kPixels>(acc, a + k * (kSlabBytes / 4 / 16), x + k * 2 * p.plane_pitch);
        products_commit();
        products_wait<1>();
        hold_registers(acc);
        if (before) release(before);
        before = ring.emptied();
      }
      products_wait<0>();
      hold_registers(acc);
      if (before) release(before);
      if (lane == 0) phase_arrive(halo.emptied());
    }
    results.send(acc, item);
  }
}

template <class T, int kPixels, class Activation>
__global__ void __launch_bounds__(kThreads, 1) wide_fprop_kernel(Wide p) {
#ifdef HETCONV_WGMMA
  const Layout at(p);
  const uint32_t shared = shared_begin();
  const Barriers barriers{shared + at.barriers, p.stages, p.slots};
  const int rank = p.cluster == 1 ? 0 : int(cluster_rank());
  const int first = int(blockIdx.x) / p.cluster, step = int(gridDim.x) / p.cluster;
  if (threadIdx.x == 0) {
    const Ring halo = barriers.halo();
    for (int i = 0; i < p.stages; ++i) {
      phase_init(halo.full + i * 8, kHaloThreads);
      phase_init(halo.empty + i * 8, 4 * kWarpgroups);
    }
    for (int group = 0; group < kWarpgroups; ++group) {
      const Ring slabs = barriers.slabs(group);
      for (int i = 0; i < p.slots; ++i) {
        phase_init(slabs.full + i * 8, 1);
        phase_init(slabs.empty + i * 8, 4 * p.cluster);
      }
    }
    phase_init_done();
  }
  if (p.cluster == 1)
    barrier();
  else
    cluster_barrier();
  const int warp = warp_index();
  if (warp < 4) {
    fewer_registers<kBringRegisters>();
    if (warp)
      HaloBringer<kPixels>{p, shared + at.halo, at.stage, int(threadIdx.x) - 32}.run(
          barriers.halo(), first, step, rank);
    else if (threadIdx.x == 0)
      bring_slabs(p, shared + at.slabs, barriers, first, step, rank);
  } else {
    more_registers<kComputeRegisters>();
    compute<T, kPixels, Activation>(p, shared, at, barriers, warp / 4 - 1, first, step, rank);
  }
  // Nobody leaves while another block may still copy to its shared memory or arrive there.
  if (p.cluster != 1) cluster_barrier();
#endif
}

using Kernel = void (*)(Wide);

template <class T, int kPixels> Kernel pick(Act act) {
  const bool smooth = act == Act::silu || act == Act::gelu;
  return smooth ? wide_fprop_kernel<T, kPixels, Smooth> : wide_fprop_kernel<T, kPixels, Clamp>;
}

template <class T> Kernel pick(const Wide& p) {
  switch (p.pixels) {
    case 64: return pick<T, 64>(p.act);
    case 128: return pick<T, 128>(p.act);
    case 224: return pick<T, 224>(p.act);
    case 256: return pick<T, 256>(p.act);
    default: return nullptr;
  }
}

Kernel pick(const Wide& p, DType dtype) {
  if (dtype == DType::bf16) return pick<Bfloat>(p);
  return dtype == DType::f16 ? pick<Half>(p) : nullptr;
}

}  // namespace
}  // namespace wide

using wide::kThreads;
using wide::Layout;
using wide::pick;

int64_t wide_shared_bytes(const Wide& p) { return Layout(p).total; }

int64_t wide_blocks(const Wide& p, DType dtype) {
  const wide::Kernel kernel = pick(p, dtype);
  if (!kernel || !is_capability(9, 0)) return 0;
  return held_clustered(kernel, kThreads, wide_shared_bytes(p), p.cluster);
}

const char* wide_fprop(const Wide& p, DType dtype, void* stream) {
  const wide::Kernel kernel = pick(p, dtype);
  if (!kernel) return "the wide kernels are built for bf16 and fp16, 64, 128, 224 or 256 pixels";
  if (!is_capability(9, 0)) return "the wide kernels are built for compute capability 9.0 only";
  if (p.cluster != 1 && p.cluster != 2) return "a cluster has one or two blocks";
  if (p.stages < 1 || p.slots < 2) return "there are one or more stages and two or more slots";
  if (p.plane_pitch % 8 != 1) return "the plane pitch is one more than a multiple of eight";
  if (wide_shared_bytes(p) > wide::kMostShared) return "the rings do not fit into shared memory";
  const int64_t blocks = p.grid ? p.grid : wide_blocks(p, dtype);
  if (blocks < 1) return "the device cannot hold a block of this shape";
  if (blocks % p.cluster) return "the grid is no multiple of the cluster";
  return launch_clustered(kernel, p, blocks, kThreads, wide_shared_bytes(p), p.cluster, stream);
}

}  // namespace hetconv::cuda
