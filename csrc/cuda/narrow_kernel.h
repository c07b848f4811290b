// SPDX-License-Identifier: Apache-2.0
// The program of fprop and dgrad for narrow groups: a tile of pixels with its halo is brought to
// shared memory once, and all taps and groups are computed from it.
//
// A thread block (CTA) stays with one class of pixels and one part of the filters (a head) and
// takes tile after tile, so that weights and step lists are read once; with two buffers the next
// halo is prefetched meanwhile (double buffering). Each warp has 32 pixels by 64 filters: pixels
// are the sixteen rows of a matrix instruction and filters its eight columns, so a group of eight
// filters fits exactly. A step is any two slots of eight channels at any two taps; ldmatrix takes
// an address from every lane, so a step costs one add (see narrow_lowering.py).
//
// Halos are brought by cp.async (narrow_fprop.cu), or by TMA where there is one (narrow_tma.cu):
// one thread then asks for a halo as a box of raw_pitch * 8 channels, and what comes beyond the
// round's own chunks, zeros or their neighbours, is where no step reads.
#pragma once
#include <type_traits>

#include "launchers.h"
#include "narrow.h"
#include "narrow_halo.h"
#include "narrow_operands.h"
#include "narrow_results.h"
#include "narrow_tma.h"
#include "ptx.h"

namespace hetconv::cuda {
namespace narrow {

constexpr int kThreads = kMaxWarps * 32;
constexpr int kTiles = kWarpFilters / 8;
constexpr int kFragmentBytes = 256;

// Where things lie in shared memory, in bytes from its begin.
struct Layout {
  int lists, words, fragments, buffers, buffer, gathered, mbarriers, total;

  __host__ __device__ Layout(const Narrow& p, bool tma) {
    const int pixels = p.warps_m * kWarpPixels, stage = pixels * stage_pitch(p, tma ? 2 : p.item);
    const int halo = p.halo_pixels * p.raw_pitch * 16;
    lists = 0;
    words = lists + aligned(p.round_count * p.warps_n * kListFields * 4);
    fragments = words + aligned((p.max_words + 1) * 4);
    buffers = fragments + (p.resident ? p.max_fragments * kFragmentBytes : 0);
    buffer = halo > stage ? halo : stage;
    if (tma) buffers = aligned(buffers, kTmaAlign), buffer = aligned(buffer, kTmaAlign);
    gathered = buffers + p.buffers * buffer;
    mbarriers = gathered + p.halo_pixels * p.slot_pitch * 16;
    total = mbarriers + (tma ? 2 * 8 : 0);
  }
  static __host__ __device__ int aligned(int bytes, int grain = 16) {
    return (bytes + grain - 1) / grain * grain;
  }
};

// The weights of a head, in shared memory or not.
template <bool kResident> struct Fragments;

template <> struct Fragments<true> {
  uint32_t at;
  __device__ Fragments(const char*, uint32_t shared, int first)
      : at(shared + first * kFragmentBytes) {}
  __device__ Pair one(int lane) const { return load_shared64(at + lane * 8); }
  __device__ Quad two(int pair, int lane) const {
    return load_shared128(at + pair * 2 * kFragmentBytes + lane * 16);
  }
  __device__ void advance(int count) { at += count * kFragmentBytes; }
};

template <> struct Fragments<false> {
  const char* at;
  __device__ Fragments(const char* slabs, uint32_t, int first)
      : at(slabs + first * kFragmentBytes) {}
  __device__ Pair one(int lane) const { return load_table64(at + lane * 8); }
  __device__ Quad two(int pair, int lane) const {
    return load_table128(at + pair * 2 * kFragmentBytes + lane * 16);
  }
  __device__ void advance(int count) { at += count * kFragmentBytes; }
};

using Accumulators = WarpResults<kTiles>;

// Runs the list of the tiles kFirst ... kFirst + kSize - 1.
template <class T, int kFirst, int kSize, class Weights>
__device__ __forceinline__ void run_list(Accumulators& acc, const uint32_t (&base)[2],
                                         uint32_t words, int count, int shift, Weights& weights,
                                         int lane) {
  uint32_t word = load_shared32(words);
  for (int s = 0; s < count; ++s) {
    const uint32_t offset = ((word >> shift) & 0xFFFF) * 16;
    words += 4;
    word = load_shared32(words);  // one step ahead; there is a spare word at the end
    const Operand<T> a[2] = {Operand<T>(load_matrices(base[0] + offset)),
                             Operand<T>(load_matrices(base[1] + offset))};
    if constexpr (kSize == 1) {
      const Pair b = weights.one(lane);
#pragma unroll
      for (int f = 0; f < 2; ++f) a[f].multiply_by(acc[f][kFirst], b.v[0], b.v[1]);
    } else {
#pragma unroll
      for (int pair = 0; pair < kSize / 2; ++pair) {
        const Quad b = weights.two(pair, lane);
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          a[f].multiply_by(acc[f][kFirst + 2 * pair], b.v[0], b.v[1]);
          a[f].multiply_by(acc[f][kFirst + 2 * pair + 1], b.v[2], b.v[3]);
        }
      }
    }
    weights.advance(kSize);
  }
}

// Runs the lists of all ranges of kSize tiles, then those of half of that.
template <class T, int kSize, int kList, class Weights> struct Lists {
  template <int kFirst>
  static __device__ __forceinline__ void from(Accumulators& acc, const uint32_t (&base)[2],
                                              uint32_t lists, uint32_t words, int shift,
                                              Weights& weights, int lane) {
    constexpr int kAt = kList + kFirst / kSize;
    const uint32_t at = lists + (kListBegin + kAt) * 4;
    const uint32_t begin = load_shared32(at);
    const int count = int(load_shared32(at + 4) - begin);
    if (count)
      run_list<T, kFirst, kSize>(acc, base, words + begin * 4, count, shift, weights, lane);
    if constexpr (kFirst + kSize < kTiles)
      from<kFirst + kSize>(acc, base, lists, words, shift, weights, lane);
    else if constexpr (kSize > 1)
      Lists<T, kSize / 2, kList + kTiles / kSize, Weights>::template from<0>(
          acc, base, lists, words, shift, weights, lane);
  }
};

// Walks the loads of a head: rounds that bring chunks, tile after tile.
struct Cursor {
  const int32_t* rounds;
  int round_count, items, step, item, round;

  __device__ Cursor(const int32_t* rounds, int round_count, int items)
      : rounds(rounds),
        round_count(round_count),
        items(items),
        step(gridDim.x),
        item(blockIdx.x),
        round(-1) {}

  // Goes to the next load; false at the end. Round 0 of a head without any load has no chunks.
  __device__ bool next() {
    if (load_table(rounds + kChunkCount) == 0) return false;
    do {
      if (++round == round_count) round = 0, item += step;
    } while (item < items && load_table(rounds + round * kRoundFields + kChunkCount) == 0);
    return item < items;
  }
};

inline int threads_of(const Narrow& p) { return p.warps_m * p.warps_n * 32; }

// Picks the kernel of a call among `Kernels`, those for one way to bring halos; null if none of
// them is for it.
template <class Kernels, class T> auto pick(const Narrow& p) {
  const bool smooth = is_smooth(p.act);
  if (p.resident)
    return smooth ? Kernels::template of<T, true, Smooth>()
                  : Kernels::template of<T, true, Clamp>();
  return smooth ? Kernels::template of<T, false, Smooth>()
                : Kernels::template of<T, false, Clamp>();
}
template <class Kernels> auto pick(const Narrow& p, DType dtype) {
  if constexpr (Kernels::kSingle)
    if (dtype == DType::f32) return p.split ? pick<Kernels, Tf32x3>(p) : pick<Kernels, Tf32>(p);
  return pick_by_type(dtype, [&](auto type) { return pick<Kernels, decltype(type)>(p); });
}

// As narrow_blocks for all heads together, and narrow_fprop, for halos that TMA brings.
int64_t max_resident_tma(const Narrow& p, DType dtype);
const char* launch_tma(const Narrow& p, DType dtype, int64_t blocks, void* stream);

// Two blocks of most threads in the registers, where their number then suffices without spills.
template <class T, bool kResident, class Activation>
constexpr int kResidentBlocks =
    kResident && std::is_same_v<Activation, Clamp> && !std::is_same_v<T, Tf32x3> ? 2 : 1;

// What one block works on: the tiles of one class of pixels by one part of the filters (a head). P
// is Narrow, or NarrowTma for halos that TMA brings.
template <class P> struct Work {
  static constexpr bool kTma = std::is_same_v<P, NarrowTma>;
  const P& p;
  const int index, kind, part;           // the head, its class, its part
  const int32_t *table, *head, *rounds;  // their lines in the tables
  const uint32_t shared;
  const Layout at;

  __device__ explicit Work(const P& p)
      : p(p),
        index(blockIdx.y),
        kind(index / p.parts),
        part(index % p.parts),
        table(p.classes + kind * kClassFields),
        head(p.heads + index * kHeadFields),
        rounds(p.rounds + index * p.round_count * kRoundFields),
        shared(shared_begin()),
        at(p, kTma) {}

  // Fields are read where they are used: kept, they would only take registers from the products.
  __device__ int field(ClassField name) const { return load_table(table + name); }
  __device__ int items() const { return p.batch * field(kTilesH) * field(kTilesW); }
  __device__ TilePlace tile(int item) const {
    return TilePlace(item, field(kTilesH), field(kTilesW), p.tile_h, p.tile_w);
  }
  __device__ uint32_t buffer_at(int buffer) const {
    return shared + at.buffers + buffer * at.buffer;
  }
  __device__ uint32_t mbarrier_at(int buffer) const { return shared + at.mbarriers + buffer * 8; }
  __device__ const char* slabs() const {
    return static_cast<const char*>(p.slabs) +
           int64_t(load_table(head + kFragmentBegin)) * kFragmentBytes;
  }
  __device__ Halo halo() const {
    return Halo(field(kHaloH), field(kHaloW), field(kLoadW), p.image_h, p.image_w, p.x_h, p.x_w,
                p.raw_pitch);
  }

  // Loads what stays in shared memory: lists, words, and weights where they are resident.
  __device__ __forceinline__ void load_head(bool resident) const {
    const int list_count = p.round_count * p.warps_n * kListFields;
    const int word_count = load_table(head + kWordCount);
    const int32_t* words = p.words + load_table(head + kWordBegin);
    for (int i = threadIdx.x; i < list_count; i += blockDim.x)
      store_shared32(shared + at.lists + i * 4, load_table(p.lists + index * list_count + i));
    for (int i = threadIdx.x; i <= word_count; i += blockDim.x)
      store_shared32(shared + at.words + i * 4, i < word_count ? load_table(words + i) : 0);
    if (!resident) return;
    const int pieces = load_table(head + kFragmentCount) * (kFragmentBytes / 16);
    for (int i = threadIdx.x; i < pieces; i += blockDim.x)
      copy_async(shared + at.fragments + i * 16, slabs() + i * 16, true);
  }

  __device__ __forceinline__ void init_mbarriers() const {
    if (threadIdx.x) return;
    for (int i = 0; i < p.buffers; ++i) mbarrier_init(mbarrier_at(i), 1);
    mbarrier_init_done();
    fence_async();
  }

  // Starts the copy of a halo; with two buffers it is prefetched while the one before is computed
  // from (double buffering).
  template <class T> __device__ __forceinline__ void prefetch(const Cursor& c, int buffer) const {
    if (kTma && threadIdx.x) return;  // one thread, the producer, asks for all of a box
    const TilePlace place = tile(c.item);
    const int32_t* round = rounds + c.round * kRoundFields;
    const int32_t* chunks = p.chunks + load_table(round + kChunkBegin);
    const int row = place.row * field(kLoadH) + field(kBaseH);
    const int col = place.col * field(kLoadW) + field(kBaseW);
    const uint32_t to = buffer_at(buffer);
    if constexpr (kTma) {
      const int pixels = field(kHaloH) * field(kHaloW);
      mbarrier_expect(mbarrier_at(buffer), pixels * p.raw_pitch * 16);
      tma_load(to, &p.maps[kind], load_table(chunks) * 8, col, row, place.image,
               mbarrier_at(buffer));
    } else {
      halo().template load<T>(
          static_cast<const char*>(p.x) + int64_t(place.image) * p.x_n * kItem<T>, chunks,
          load_table(round + kChunkCount), row, col, to);
    }
  }

  // Waits for the halo in a buffer: all copies but those of the other one have ended.
  __device__ __forceinline__ void wait_filled(int buffer, uint32_t& parity) const {
    if constexpr (kTma) {
      parity ^= buffer == 0;
      mbarrier_wait(mbarrier_at(buffer), parity, mbarrier_at(0));
    } else {
      copy_commit();
      if (p.buffers == 2)
        copy_wait<1>();
      else
        copy_wait<0>();
    }
  }

  // Where the tap at the halo's begin reads a lane's rows of x, in bytes from the halo.
  __device__ __forceinline__ void first_pixels(uint32_t (&first)[2], int warp_m, int lane) const {
    const int pitch = p.slot_pitch ? p.slot_pitch : p.raw_pitch;
    const int load_h = field(kLoadH), load_w = field(kLoadW);
    const int line = (field(kHaloW) + load_w - 1) / load_w * load_w;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      int m = (warp_m * 2 + f) * 16 + lane % 16;
      if (m >= p.tile_h * p.tile_w) m = 0;  // computed, not stored
      const int i = m / p.tile_w, j = m - i * p.tile_w;
      first[f] = uint32_t((i * load_h * line + j) * pitch * 16);
    }
  }
};

// Stores a tile of results through the staging tile, which takes the place of its halo.
template <class T, class Activation, class P>
__device__ __forceinline__ void store_tile(const Work<P>& work, int item, uint32_t stage,
                                           const Accumulators& acc, int warp_m, int warp_n,
                                           int lane) {
  const P& p = work.p;
  const Target target(p, work.table, work.tile(item));
  const Columns<T> columns(p, work.head, work.part);
  if (p.residual) {
    columns.load(p, target, stage);
    barrier();
  }
  stage_results<T, Activation, kTiles>(p, columns, stage, acc, warp_m, warp_n, lane);
  // What comes next by TMA comes after what was written here.
  if constexpr (Work<P>::kTma) fence_async();
  barrier();
  columns.store(p, target, stage);
  barrier();  // the next tile may be fetched to where the results were
}

// The program of a block.
template <class T, bool kResident, class Activation, class P>
__device__ __forceinline__ void compute(const P& p) {
  const Work<P> work(p);
  constexpr bool kTma = Work<P>::kTma;
  const int items = work.items();
  if (int(blockIdx.x) >= items) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % p.warps_m, warp_n = warp / p.warps_m;
  const uint32_t shared = work.shared;
  const Layout& at = work.at;
  const char* slabs = work.slabs();

  work.load_head(kResident);
  if constexpr (kTma) work.init_mbarriers();
  Cursor ahead(work.rounds, p.round_count, items);
  if (p.buffers == 2 && ahead.next()) work.template prefetch<T>(ahead, 0);
  copy_commit();
  if constexpr (kTma) {
    copy_wait<0>();  // for the weights
    barrier();
  }
  const int shift = lane / 16 * 16;
  uint32_t first[2];
  work.first_pixels(first, warp_m, lane);

  int buffer = p.buffers - 1;  // the one in use; the first load changes it to 0
  uint32_t parity = 1;         // of its barrier's phase
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    Accumulators acc = {};
    for (int r = 0; r < p.round_count; ++r) {
      const int32_t* round = work.rounds + r * kRoundFields;
      if (load_table(round + kChunkCount)) {
        buffer = buffer + 1 == p.buffers ? 0 : buffer + 1;
        if (ahead.next()) work.template prefetch<T>(ahead, p.buffers == 2 ? 1 - buffer : 0);
        work.wait_filled(buffer, parity);
      }
      if constexpr (!kTma) barrier();
      uint32_t source = work.buffer_at(buffer);
      const int slot_count = load_table(round + kSlotCount);
      if (slot_count) {
        work.halo().template gather<T>(p.slots + load_table(round + kSlotBegin) * 4, slot_count,
                                       source, p.slot_pitch, shared + at.gathered);
        source = shared + at.gathered;
        barrier();
      }
      const uint32_t base[2] = {source + first[0], source + first[1]};
      const uint32_t lists = shared + at.lists + (r * p.warps_n + warp_n) * kListFields * 4;
      Fragments<kResident> weights(slabs, shared + at.fragments,
                                   int(load_shared32(lists + kListFragment * 4)));
      Lists<T, kTiles, 0, Fragments<kResident>>::template from<0>(
          acc, base, lists, shared + at.words, shift, weights, lane);
      // Nobody reads this round's tile any more.
      barrier();
    }
    store_tile<T, Activation>(work, item, work.buffer_at(buffer), acc, warp_m, warp_n, lane);
  }
  if constexpr (!kTma) copy_wait<0>();
}

}  // namespace narrow
}  // namespace hetconv::cuda
