// SPDX-License-Identifier: Apache-2.0
// fprop and dgrad for wide groups on Hopper: the halo of a tile is brought to shared memory once,
// and all taps are computed from it by wgmma, filters by pixels.
//
// Warps are specialised: a thread block (CTA) is persistent and has one warpgroup of producers
// (two warps load the halo, a thread for each consumer its slabs of weights) and two of consumers,
// each of which computes one segment of 64 filters on the same halo, the second some steps behind.
// mbarriers of rings in shared memory tell them what is full and what is empty. In a cluster two
// blocks compute two tiles of the same filters, and each loads one half of every slab for both.
#include "epilogue.h"
#include "hopper.h"
#include "launchers.h"
#include "wide.h"
#include "wide_producer.h"
#include "wide_results.h"
#include "wide_work.h"

namespace hetconv::cuda {
namespace wide {
namespace {

// The consumers: each warpgroup computes one segment of every item.
template <class T, int kPixels, class Activation, bool kFlat>
__device__ void compute(const Wide& p, uint32_t shared, const Layout& at, const Barriers& barriers,
                        int group, int first, int step, int rank) {
  const int thread = int(threadIdx.x) % kGroupThreads, lane = thread % 32;
  Ring halo = barriers.halo(), ring = barriers.slabs(group);
  const uint32_t slabs = shared + at.slabs + group * p.slots * kSlotBytes;
  const Results<T, kPixels, Activation, kFlat> results{
      p, shared + at.staged + uint32_t(group) * 2 * kStagedBytes, group, thread};
  // Gives a slot back, to both blocks of a cluster as each brings half of what comes next.
  auto release = [&](uint32_t barrier) {
    if (lane) return;
    if (p.cluster == 1) {
      mbarrier_arrive(barrier);
    } else {
      mbarrier_arrive_at(barrier, 0);
      mbarrier_arrive_at(barrier, 1);
    }
  };
  // The first warpgroup has the other one begin after some steps, or after its first block: with
  // one halo in shared memory it would wait for the other one there.
  int lead = group ? 0 : kLead;
  auto follow = [&] {
    if (lane == 0) mbarrier_arrive(barriers.lead());
    lead = 0;
  };
  Item item;
  for (int index = first; item.find(p, index, rank); index += step) {
    if (group && index == first) mbarrier_wait(barriers.lead(), 0, barriers.begin);
    const int32_t* block = p.blocks + load_table(item.head + kBlockBegin) * kBlockFields;
    const int count = load_table(item.head + kBlockCount);
    const uint32_t next_rows =
        uint32_t(load_table(item.table + kLoadH) * load_table(item.table + kRowPitch));
    float acc[kPixels / 2] = {};
    // The barriers of the slot and of the halo that the last products read. They are given back
    // once the next products are on their way, which those of the next block may be, but not where
    // these would wait for that very halo's place: with one stage, and after a block without a
    // step.
    uint32_t slot = 0, place = 0;
    auto let_go = [&] {
      if (slot) release(slot);
      if (place && lane == 0) mbarrier_arrive(place);
      slot = place = 0;
    };
    auto finish = [&] {
      products_wait<0>();
      hold_registers(acc);
      let_go();
    };
    for (int b = 0; b < count; ++b, block += kBlockFields, halo.advance()) {
      const int32_t* own = block + kSteps + group * kStepsFields;
      const int32_t* windows = p.steps + load_table(own + kStepBegin);
      const int steps = load_table(own + kStepCount);
      const uint32_t planes = shared + at.halo + halo.at * at.stage;
      halo.wait_filled();
      fence_async();  // here, as those who copied are further on already
      for (int s = 0; s < steps; ++s, ring.advance()) {
        const uint32_t window = uint32_t(load_table(windows + s));
        const uint64_t a = operand(slabs + ring.at * kSlotBytes, 64, 8);
        const uint64_t x = operand(planes + window * 16, uint32_t(p.plane_pitch), next_rows);
        ring.wait_filled();
        hold_registers(acc);
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          product<T, kPixels>(acc, a + k * (kSlabBytes / 4 / 16), x + k * 2 * p.plane_pitch);
        products_commit();
        products_wait<1>();
        hold_registers(acc);
        let_go();
        slot = ring.emptied();
        if (lead && s + 1 == lead) follow();
      }
      if (lead) follow();
      if (!steps) finish();
      place = halo.emptied();
      if (!steps || p.stages == 1) finish();
    }
    finish();
    if (lead) follow();  // there was no block
    results.send(acc, item);
  }
}

template <class T, int kPixels, class Activation, bool kFlat>
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
      mbarrier_init(halo.full + i * 8, kHaloThreads);
      mbarrier_init(halo.empty + i * 8, 4 * kWarpgroups);
    }
    for (int group = 0; group < kWarpgroups; ++group) {
      const Ring slabs = barriers.slabs(group);
      for (int i = 0; i < p.slots; ++i) {
        mbarrier_init(slabs.full + i * 8, 1);
        mbarrier_init(slabs.empty + i * 8, 4 * p.cluster);
      }
    }
    mbarrier_init(barriers.lead(), 4);
    mbarrier_init_done();
  }
  if (p.cluster == 1)
    barrier();
  else
    cluster_barrier();
  const int warp = warp_index();
  if (warp < 4) {
    fewer_registers<kProducerRegisters>();
    if (warp >= kWarpgroups)
      HaloProducer<kPixels, kFlat>{p, shared + at.halo, at.stage,
                                   int(threadIdx.x) - 32 * kWarpgroups}
          .run(barriers.halo(), first, step, rank);
    else if (threadIdx.x % 32 == 0)
      produce_slabs(p, shared + at.slabs + warp * p.slots * kSlotBytes, barriers.slabs(warp), warp,
                    first, step, rank);
  } else {
    more_registers<kConsumerRegisters>();
    compute<T, kPixels, Activation, kFlat>(p, shared, at, barriers, warp / 4 - 1, first, step,
                                           rank);
  }
  // Nobody leaves while another block may still copy to its shared memory or arrive there.
  if (p.cluster != 1) cluster_barrier();
#endif
}

using Kernel = void (*)(Wide);

template <class T, int kPixels, bool kFlat = false> Kernel pick(Act act) {
  return is_smooth(act) ? wide_fprop_kernel<T, kPixels, Smooth, kFlat>
                        : wide_fprop_kernel<T, kPixels, Clamp, kFlat>;
}

template <class T> Kernel pick(const Wide& p) {
  if (p.flat_pitch) {
    if (p.pixels == 208) return pick<T, 208, true>(p.act);
    return p.pixels == 224 ? pick<T, 224, true>(p.act) : nullptr;
  }
  switch (p.pixels) {
    case 64:
      return pick<T, 64>(p.act);
    case 128:
      return pick<T, 128>(p.act);
    case 224:
      return pick<T, 224>(p.act);
    case 256:
      return pick<T, 256>(p.act);
    default:
      return nullptr;
  }
}

Kernel pick(const Wide& p, DType dtype) {
  return pick_by_type(dtype, [&](auto type) { return pick<decltype(type)>(p); });
}

}  // namespace
}  // namespace wide

using wide::kThreads;
using wide::Layout;
using wide::pick;

int64_t wide_shared_bytes(const Wide& p) { return Layout(p).total; }

int64_t wide_blocks(const Wide& p, DType dtype) {
  const wide::Kernel kernel = pick(p, dtype);
  if (!kernel || capability() != 90) return 0;
  return max_resident_clustered(kernel, kThreads, wide_shared_bytes(p), p.cluster);
}

const char* wide_fprop(const Wide& p, DType dtype, void* stream) {
  const wide::Kernel kernel = pick(p, dtype);
  if (!kernel)
    return "the wide kernels are built for bf16 and fp16, 64, 128, 224 or 256 pixels, "
           "with flattened rows for 208 or 224";
  if (capability() != 90) return "the wide kernels are built for compute capability 9.0 only";
  if (p.cluster != 1 && p.cluster != 2) return "a cluster has one or two blocks";
  if (p.flat_pitch && (p.flat_pitch < 8 || p.class_count != 1))
    return "flattened rows have one class, and 8 places or more to the next row";
  if (p.stages < 1 || p.slots < 2) return "there are one or more stages and two or more slots";
  if (p.plane_pitch % 8 != 1) return "the plane pitch is one more than a multiple of eight";
  if (wide_shared_bytes(p) > wide::kMostShared) return "the rings do not fit into shared memory";
  const int64_t blocks = p.grid ? p.grid : wide_blocks(p, dtype);
  if (blocks < 1) return "the device cannot hold a block of this shape";
  if (blocks % p.cluster) return "the grid is no multiple of the cluster";
  return launch_clustered(kernel, p, blocks, kThreads, wide_shared_bytes(p), p.cluster, stream);
}

}  // namespace hetconv::cuda
