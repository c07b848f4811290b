// SPDX-License-Identifier: Apache-2.0
// The program of fprop and dgrad for narrow groups: a tile of pixels with its halo is brought to
// shared memory once, and all taps and groups are computed from it.
//
// A block stays with one class of pixels and one part of the filters (a head) and takes tile after
// tile, so that weights and step lists are read once. Each warp has 32 pixels by 64 filters:
// pixels are the sixteen rows of a matrix instruction and filters its eight columns, so a group of
// eight filters fits exactly. A step is any two slots of eight channels at any two taps; ldmatrix
// takes an address from every lane, so a step costs one add (see lowering.py).
//
// Halos are brought by cp.async (narrow_fprop.cu), or by TMA where there is one (narrow_boxes.cu):
// one thread then asks for a halo as a box of raw_pitch * 8 channels, and what comes beyond the
// round's own chunks, zeros or their neighbours, is where no step reads.
#pragma once
#include <type_traits>

#include "boxes.h"
#include "epilogue.h"
#include "halo.h"
#include "narrow.h"
#include "ptx.h"
#include "stage.h"

namespace hetconv::cuda {
namespace narrow {

constexpr int kThreads = kMaxWarps * 32;
constexpr int kTiles = kWarpFilters / 8;
constexpr int kListFields = kLists + 2;
constexpr int kFragmentBytes = 256;

// Where things lie in shared memory, in bytes from its begin.
struct Layout {
  int lists, words, fragments, buffers, buffer, gathered, phases, total;

  __host__ __device__ Layout(const Narrow& p, bool boxes) {
    const int pixels = p.warps_m * kWarpPixels, stage = pixels * stage_pitch(p.warps_n);
    const int halo = p.halo_pixels * p.raw_pitch * 16;
    lists = 0;
    words = lists + aligned(p.round_count * p.warps_n * kListFields * 4);
    fragments = words + aligned((p.max_words + 1) * 4);
    buffers = fragments + (p.resident ? p.max_fragments * kFragmentBytes : 0);
    buffer = halo > stage ? halo : stage;
    if (boxes) buffers = aligned(buffers, kBoxGrain), buffer = aligned(buffer, kBoxGrain);
    gathered = buffers + p.buffers * buffer;
    phases = gathered + p.halo_pixels * p.slot_pitch * 16;
    total = phases + (boxes ? 2 * 8 : 0);
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

using Accumulators = float[2][kTiles][4];

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
    Quad a[2];
#pragma unroll
    for (int f = 0; f < 2; ++f) a[f] = load_matrices(base[f] + offset);
    if constexpr (kSize == 1) {
      const Pair b = weights.one(lane);
#pragma unroll
      for (int f = 0; f < 2; ++f) multiply<T>(acc[f][kFirst], a[f], b.v[0], b.v[1]);
    } else {
#pragma unroll
      for (int pair = 0; pair < kSize / 2; ++pair) {
        const Quad b = weights.two(pair, lane);
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          multiply<T>(acc[f][kFirst + 2 * pair], a[f], b.v[0], b.v[1]);
          multiply<T>(acc[f][kFirst + 2 * pair + 1], a[f], b.v[2], b.v[3]);
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
    const uint32_t begin = load_shared32(lists + kAt * 4);
    const int count = int(load_shared32(lists + kAt * 4 + 4) - begin);
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

// As narrow_blocks for all heads together, and narrow_fprop, for halos that TMA brings.
int64_t held_boxes(const Narrow& p, DType dtype);
const char* launch_boxes(const Narrow& p, DType dtype, int64_t blocks, void* stream);

// Two blocks of most threads in the registers, where their number then suffices without spills.
template <bool kResident, class Activation>
constexpr int kHeld = kResident && std::is_same_v<Activation, Clamp> ? 2 : 1;

// The program of a block; P is Narrow, or NarrowBoxes for halos that TMA brings.
template <class T, bool kResident, class Activation, class P>
__device__ __forceinline__ void compute(const P& p) {
  constexpr bool kBoxes = std::is_same_v<P, NarrowBoxes>;
  const int head_index = blockIdx.y, kind = head_index / p.parts, part = head_index % p.parts;
  const int32_t* table = p.classes + kind * kClassFields;
  const int tiles_h = load_table(table + kTilesH), tiles_w = load_table(table + kTilesW);
  const int items = p.batch * tiles_h * tiles_w;
  if (int(blockIdx.x) >= items) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % p.warps_m, warp_n = warp / p.warps_m;
  const int32_t* head = p.heads + head_index * kHeadFields;
  const int32_t* rounds = p.rounds + head_index * p.round_count * kRoundFields;
  const Layout at(p, kBoxes);
  const uint32_t shared = shared_begin();
  const int load_h = load_table(table + kLoadH), load_w = load_table(table + kLoadW);
  // Made where it is used: it would only take registers from the products.
  auto halo = [&] {
    return Halo(load_table(table + kHaloH), load_table(table + kHaloW), load_w, p.image_h,
                p.image_w, p.x_h, p.x_w, p.raw_pitch);
  };
  const char* slabs = static_cast<const char*>(p.slabs) +
                      int64_t(load_table(head + kFragmentBegin)) * kFragmentBytes;

  // What stays: lists, words, and weights.
  const int list_count = p.round_count * p.warps_n * kListFields;
  const int word_count = load_table(head + kWordCount);
  const int32_t* head_words = p.words + load_table(head + kWordBegin);
  for (int i = threadIdx.x; i < list_count; i += blockDim.x)
    store_shared32(shared + at.lists + i * 4, load_table(p.lists + head_index * list_count + i));
  for (int i = threadIdx.x; i <= word_count; i += blockDim.x)
    store_shared32(shared + at.words + i * 4, i < word_count ? load_table(head_words + i) : 0);
  if (kResident) {
    const int pieces = load_table(head + kFragmentCount) * (kFragmentBytes / 16);
    for (int i = threadIdx.x; i < pieces; i += blockDim.x)
      copy_async(shared + at.fragments + i * 16, slabs + i * 16, true);
  }
  if constexpr (kBoxes) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.buffers; ++i) phase_init(shared + at.phases + i * 8, 1);
      phase_init_done();
      fence_async();
    }
  }

  auto fetch = [&](const Cursor& c, int buffer) {
    if (kBoxes && threadIdx.x) return;  // one thread asks for all of a box
    const TilePlace tile(c.item, tiles_h, tiles_w, p.tile_h, p.tile_w);
    const int32_t* round = rounds + c.round * kRoundFields;
    const int32_t* chunks = p.chunks + load_table(round + kChunkBegin);
    const int row = tile.row * load_h + load_table(table + kBaseH);
    const int col = tile.col * load_w + load_table(table + kBaseW);
    const uint32_t to = shared + at.buffers + buffer * at.buffer;
    if constexpr (kBoxes) {
      const uint32_t phase = shared + at.phases + buffer * 8;
      const int pixels = load_table(table + kHaloH) * load_table(table + kHaloW);
      phase_expect(phase, pixels * p.raw_pitch * 16);
      copy_box(to, &p.maps[kind], load_table(chunks) * 8, col, row, tile.image, phase);
    } else {
      halo().load(static_cast<const char*>(p.x) + int64_t(tile.image) * p.x_n * 2, chunks,
                  load_table(round + kChunkCount), row, col, to);
    }
  };
  Cursor ahead(rounds, p.round_count, items);
  if (p.buffers == 2 && ahead.next()) fetch(ahead, 0);
  copy_commit();
  if constexpr (kBoxes) {
    copy_wait<0>();  // for the weights
    barrier();
  }

  // The pixels of this lane's rows of x: where the tap at the halo's begin reads them.
  const int shift = lane / 16 * 16, pitch = p.slot_pitch ? p.slot_pitch : p.raw_pitch;
  const int line = (load_table(table + kHaloW) + load_w - 1) / load_w * load_w;
  uint32_t first[2];
#pragma unroll
  for (int f = 0; f < 2; ++f) {
    int m = (warp_m * 2 + f) * 16 + lane % 16;
    if (m >= p.tile_h * p.tile_w) m = 0;  // computed, not stored
    const int i = m / p.tile_w, j = m - i * p.tile_w;
    first[f] = uint32_t((i * load_h * line + j) * pitch * 16);
  }

  int buffer = p.buffers - 1;  // the one in use; the first load changes it to 0
  uint32_t parity = 1;         // of its phase
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    Accumulators acc = {};
    for (int r = 0; r < p.round_count; ++r) {
      const int32_t* round = rounds + r * kRoundFields;
      if (load_table(round + kChunkCount)) {
        buffer = buffer + 1 == p.buffers ? 0 : buffer + 1;
        if (ahead.next()) fetch(ahead, p.buffers == 2 ? 1 - buffer : 0);
        if constexpr (kBoxes) {
          parity ^= buffer == 0;
          phase_wait(shared + at.phases + buffer * 8, parity, shared + at.phases);
        } else {
          copy_commit();
          if (p.buffers == 2)
            copy_wait<1>();
          else
            copy_wait<0>();
        }
      }
      if constexpr (!kBoxes) barrier();
      uint32_t source = shared + at.buffers + buffer * at.buffer;
      const int slot_count = load_table(round + kSlotCount);
      if (slot_count) {
        halo().gather(p.slots + load_table(round + kSlotBegin) * 4, slot_count, source,
                      p.slot_pitch, shared + at.gathered);
        source = shared + at.gathered;
        barrier();
      }
      const uint32_t base[2] = {source + first[0], source + first[1]};
      const uint32_t lists = shared + at.lists + (r * p.warps_n + warp_n) * kListFields * 4;
      Fragments<kResident> weights(slabs, shared + at.fragments,
                                   int(load_shared32(lists + (kLists + 1) * 4)));
      Lists<T, kTiles, 0, Fragments<kResident>>::template from<0>(
          acc, base, lists, shared + at.words, shift, weights, lane);
      // Nobody reads this round's tile any more.
      barrier();
    }

    const TilePlace tile(item, tiles_h, tiles_w, p.tile_h, p.tile_w);
    const Target target(p, table, tile);
    const uint32_t stage = shared + at.buffers + buffer * at.buffer;
    const Columns columns(p, head, part);
    if (p.residual) {
      columns.bring(p, target, stage);
      barrier();
    }
    const Activation activate(p.act);
    const uint32_t top = stage + (warp_m * kWarpPixels + lane / 4) * columns.pitch;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = warp_n * kWarpFilters + n * 8 + lane % 4 * 2;
      const int f0 = load_table(columns.rows + column), f1 = load_table(columns.rows + column + 1);
      if (f0 < 0) continue;  // then f1 is none either
      const bool second = f1 >= 0;
      float scale[2] = {1.0f, 1.0f}, shifts[2] = {0.0f, 0.0f};
      if (p.scale) scale[0] = p.scale[f0], scale[1] = second ? p.scale[f1] : 1.0f;
      if (p.shift) shifts[0] = p.shift[f0], shifts[1] = second ? p.shift[f1] : 0.0f;
      const uint32_t cell0 = columns.cell(column, f0), cell1 = columns.cell(column + 1, f1);
      const bool together = cell1 == cell0 + 2 && cell0 % 4 == 0;
#pragma unroll
      for (int half = 0; half < 4; ++half) {
        const uint32_t row = top + half * 8 * columns.pitch;
        float v[2] = {acc[half / 2][n][half % 2 * 2], acc[half / 2][n][half % 2 * 2 + 1]};
        v[0] = v[0] * scale[0] + shifts[0];
        v[1] = v[1] * scale[1] + shifts[1];
        if (p.residual) {
          uint32_t old;
          if (together)
            old = load_shared32(row + cell0);
          else
            old = load_shared16(row + cell0) | (second ? load_shared16(row + cell1) << 16 : 0);
          v[0] += widen<T>(old & 0xFFFF);
          v[1] += widen<T>(old >> 16);
        }
        const uint32_t made = narrow_pair<T>(activate(v[0]), activate(v[1]));
        if (together) {
          store_shared32(row + cell0, made);
        } else {
          store_shared16(row + cell0, made & 0xFFFF);
          if (second) store_shared16(row + cell1, made >> 16);
        }
      }
    }
    // What comes next by TMA comes after what was written here.
    if constexpr (kBoxes) fence_async();
    barrier();
    columns.send(p, target, stage);
    barrier();  // the next tile may be fetched to where the results were
  }
  if constexpr (!kBoxes) copy_wait<0>();
}

}  // namespace narrow
}  // namespace hetconv::cuda
