// SPDX-License-Identifier: Apache-2.0
// fprop for scattered groups: single channels are gathered by the addresses that ldmatrix takes of
// every lane, so nothing is moved or multiplied that a filter's tile of eight does not keep.
//
// A thread block (CTA) has a tile of pixels and a part of the filters. It brings the channels of a
// block, transposed, to shared memory; each warp then runs jobs of its own on them, all pixels of
// the tile by eight filters, whose weights it reads by itself. A step loads each pixel once for all
// taps.
#include "epilogue.h"
#include "launchers.h"
#include "ptx.h"
#include "scattered.h"

namespace hetconv::cuda {
namespace scattered {
namespace {

// Where things lie in shared memory, in bytes from its begin.
struct Layout {
  int staged;  // results: [pixel of the tile][column]
  int pitch;   // from one pixel of them to the next
  int total;

  __host__ __device__ explicit Layout(const Scattered& p)
      : staged((kRows + p.side - 1) * (kCols + p.side - 1) * p.pixel_bytes),
        pitch(p.width * 2 + 16),
        total(staged + kPixels * pitch) {}
};

// The pixels of a tile.
struct Place {
  int image, row, col;

  __device__ explicit Place(const Scattered& p) {
    const int tile = blockIdx.x;
    const int tiles_h = (p.out_h + kRows - 1) / kRows, tiles_w = (p.out_w + kCols - 1) / kCols;
    const int line = tile / tiles_w, group = line / tiles_h;
    col = (tile - line * tiles_w) * kCols;
    row = (line - group * tiles_h) * kRows;
    image = group * kImages;
  }
};

// Loads the channels of a block to their slots. A warp has a row of the halo and a segment of
// channels at a time; lane 4i + c has eight of them, of image i.
template <int kSide>
__device__ __forceinline__ void load_block(const Scattered& p, const int32_t* block) {
  constexpr int kHaloCols = kCols + kSide - 1, kLines = kRows + kSide - 1;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const Place place(p);
  const int first = load_table(block + kSegmentBegin);
  const int count = load_table(block + kSegmentCount) * kLines;
  const int image = place.image + lane / 4;
  for (int item = warp; item < count; item += p.warps) {
    const int own = item / kLines, row = item - own * kLines;
    const int32_t* segment = p.segments + (first + own) * kSegmentFields;
    const int channel = load_table(segment + kSegmentIndex) * kSegment + lane % 4 * 8;
    const int y = place.row + p.base_h + row, x = place.col + p.base_w;
    const bool inside =
        image < p.batch && channel < p.channels && uint32_t(y) < uint32_t(p.image_h);
    const char* from = static_cast<const char*>(p.x);
    if (inside) from += (image * p.x_n + int64_t(y) * p.x_h + channel) * 2;
    // Number q of all lanes is a matrix, images by channels; its column r is channel
    // 8 * (r / 2) + 2 * q + r % 2 of the segment, and row r of it transposed.
    uint32_t to = shared_begin() + row * kHaloCols * p.pixel_bytes + lane % 4 * 4;
    int slot[4];
#pragma unroll
    for (int q = 0; q < 4; ++q)
      slot[q] = load_table(segment + kSlot + lane / 8 * 8 + 2 * q + lane / 4 % 2);
    constexpr int kAtOnce = 5;  // as registers hold sums meanwhile
#pragma unroll 1
    for (int begin = 0; begin < kHaloCols; begin += kAtOnce) {
      Quad read[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int col = begin + i;
        read[i] = {};
        if (inside && col < kHaloCols && uint32_t(x + col) < uint32_t(p.image_w))
          read[i] = load_table128(from + int64_t(x + col) * p.x_w * 2);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, to += p.pixel_bytes) {
        if (begin + i >= kHaloCols) break;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t images = transpose_matrix(read[i].v[q]);
          if (slot[q] >= 0) store_shared32(to + slot[q] * 16, images);
        }
      }
    }
  }
}

// What a warp adds up: of the pixels of a column, of a tile of eight filters.
using Sums = float[kCols][4];

// Runs the steps of a job in one block of channels.
template <class T, int kSide>
__device__ __forceinline__ void run(const Scattered& p, Sums& acc, int step, int last,
                                    uint32_t fragment) {
  constexpr int kHaloCols = kCols + kSide - 1;
  const int lane = int(threadIdx.x) % 32;
  // Lane 8m + i names row i of matrix m: of channels 8 * (m / 2) + i, in the upper or lower row of
  // pixels.
  const uint32_t pixels = shared_begin() + lane / 8 % 2 * kHaloCols * p.pixel_bytes;
  const int own = lane / 16 * 8 + lane % 8;
  uint32_t slot = step < last ? load_table(p.steps + step * kStep + own) : 0;
  while (step < last) {
    Pair b[kSide][kSide];
#pragma unroll
    for (int tap = 0; tap < kSide * kSide; ++tap)
      b[tap / kSide][tap % kSide] = load_table64(static_cast<const char*>(p.slabs) +
                                                 (int64_t(fragment + tap) * 32 + lane) * 8);
    fragment += kSide * kSide;
    uint32_t from = pixels + slot * 16;
    if (++step < last) slot = load_table(p.steps + step * kStep + own);
#pragma unroll
    for (int col = 0; col < kHaloCols; ++col, from += p.pixel_bytes) {
      // Two rows of pixels by sixteen channels each: of taps in the first row and in the last;
      // those between have the lower one of the former and the upper one of the latter.
      Quad a[kSide];
      a[0] = load_matrices_transposed(from);
      if constexpr (kSide == 3) {
        a[2] = load_matrices_transposed(from + 2 * kHaloCols * p.pixel_bytes);
        a[1] = {{a[0].v[1], a[2].v[0], a[0].v[3], a[2].v[2]}};
      }
#pragma unroll
      for (int kx = 0; kx < kSide; ++kx) {
        const int out = col - kx;
        if (out < 0 || out >= kCols) continue;
#pragma unroll
        for (int ky = 0; ky < kSide; ++ky)
          multiply<T>(acc[out], a[ky], b[ky][kx].v[0], b[ky][kx].v[1]);
      }
    }
  }
}

// Brings results to their places in shared memory, on top of the residual where there is one.
template <class T, class Activation>
__device__ __forceinline__ void stage(const Scattered& p, const Sums& acc, const int32_t* job,
                                      const int32_t* columns) {
  const int lane = int(threadIdx.x) % 32;
  const Activation activate(p.act);
  const int pitch = Layout(p).pitch;
  const uint32_t staged = shared_begin() + Layout(p).staged + lane / 4 * pitch;
  int column[2];
  float scale[2] = {1.0f, 1.0f}, shift[2] = {0.0f, 0.0f};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    column[h] = load_table(job + kColumn + lane % 4 * 2 + h);
    if (column[h] < 0) continue;
    const int filter = load_table(columns + column[h]);
    if (p.scale) scale[h] = p.scale[filter];
    if (p.shift) shift[h] = p.shift[filter];
  }
#pragma unroll
  for (int col = 0; col < kCols; ++col)
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const uint32_t to = staged + (row * kCols + col) * kImages * pitch;
      float v[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        v[h] = acc[col][row * 2 + h] * scale[h] + shift[h];
        if (p.residual && column[h] >= 0) v[h] += widen<T>(load_shared16(to + column[h] * 2));
      }
      const uint32_t made = activate.template pair<T>(v[0], v[1]);
      if (column[0] >= 0) store_shared16(to + column[0] * 2, made & 0xFFFF);
      if (column[1] >= 0) store_shared16(to + column[1] * 2, made >> 16);
    }
}

// Copies a tile of results to y, or the residual to where they will be: by eights of filters, or
// one by one.
template <bool kToY> __device__ __forceinline__ void copy_tile(const Scattered& p) {
  const int32_t* part = p.parts + blockIdx.y * kPartFields;
  const int pitch = Layout(p).pitch;
  const uint32_t staged = shared_begin() + Layout(p).staged;
  const Place place(p);
  const int32_t* columns = p.columns + load_table(part + kColumnBegin);
  const int count = load_table(part + kColumnCount), wide = load_table(part + kEights);
  const int pieces = wide ? count / 8 : count;
  char* const there = const_cast<char*>(static_cast<const char*>(kToY ? p.y : p.residual));
  const int lanes = pieces < int(blockDim.x) ? pieces : int(blockDim.x);
  const int every = int(blockDim.x) / lanes, own = int(threadIdx.x) / lanes;
  if (own >= every) return;
  for (int piece = int(threadIdx.x) - own * lanes; piece < pieces; piece += lanes) {
    const int filter = load_table(columns + (wide ? piece * 8 : piece));
    for (int pixel = own; pixel < kPixels; pixel += every) {
      const int image = place.image + pixel % kImages, at = pixel / kImages;
      const int row = place.row + at / kCols, col = place.col + at % kCols;
      if (image >= p.batch || row >= p.out_h || col >= p.out_w) {
        if (kToY) continue;
      }
      const bool inside = image < p.batch && row < p.out_h && col < p.out_w;
      const int64_t place_in = image * p.y_n + int64_t(row) * p.y_h + int64_t(col) * p.y_w + filter;
      const uint32_t here = staged + pixel * pitch + piece * (wide ? 16 : 2);
      if (kToY) {
        if (wide)
          store128(there + place_in * 2, load_shared128(here));
        else
          *reinterpret_cast<uint16_t*>(there + place_in * 2) = uint16_t(load_shared16(here));
      } else if (wide) {
        Quad read = {};
        if (inside) read = load_table128(there + place_in * 2);
        store_shared128(here, read);
      } else {
        store_shared16(here, inside ? *reinterpret_cast<uint16_t*>(there + place_in * 2) : 0);
      }
    }
  }
}

template <class T, int kSide, class Activation>
__global__ void __launch_bounds__(kMostThreads, 1) scattered_fprop_kernel(Scattered p) {
  // Fields are read where they are used: kept, they would only take registers from the products.
  auto field = [&](PartField name) {
    return load_table(p.parts + anew(blockIdx.y) * kPartFields + name);
  };
  auto first_job = [&](int further) {
    return load_table(p.begins + anew(blockIdx.y) * (p.warps + 1) + int(threadIdx.x) / 32 +
                      further);
  };
  if (p.residual) copy_tile<false>(p);
  for (int turn = 0; turn < field(kTurns); ++turn) {
    Sums acc = {};
    for (int b = 0; b < field(kBlockCount); ++b) {
      // What is there stays there where it is all.
      if (turn == 0 || field(kBlockCount) > 1) {
        if (b + turn) barrier();
        load_block<kSide>(p, p.blocks + (field(kBlockBegin) + b) * kBlockFields);
        barrier();
      }
      const int number = first_job(0) + turn;
      if (number >= first_job(1)) continue;
      const int32_t* span = p.spans + number * (p.most_blocks + 1);
      const int32_t* job = p.jobs + number * kJobFields;
      const int begin = load_table(span + b), done = begin - load_table(span);
      const uint32_t fragment = load_table(job + kFragmentBegin) + done * kSide * kSide;
      run<T, kSide>(p, acc, begin, load_table(span + b + 1), fragment);
    }
    const int number = first_job(0) + turn;
    if (number < first_job(1))
      stage<T, Activation>(p, acc, p.jobs + number * kJobFields, p.columns + field(kColumnBegin));
  }
  barrier();
  copy_tile<true>(p);
}

using Kernel = void (*)(Scattered);

template <class T, int kSide> Kernel pick(Act act) {
  return is_smooth(act) ? scattered_fprop_kernel<T, kSide, Smooth>
                        : scattered_fprop_kernel<T, kSide, Clamp>;
}

template <class T> Kernel pick(const Scattered& p) {
  if (p.side == 1) return pick<T, 1>(p.act);
  return p.side == 3 ? pick<T, 3>(p.act) : nullptr;
}

Kernel pick(const Scattered& p, DType dtype) {
  return pick_by_type(dtype, [&](auto type) { return pick<decltype(type)>(p); });
}

}  // namespace
}  // namespace scattered

int64_t scattered_shared_bytes(const Scattered& p) { return scattered::Layout(p).total; }

int64_t scattered_blocks(const Scattered& p, DType dtype) {
  return max_resident_blocks(scattered::pick(p, dtype), p.warps * 32, scattered_shared_bytes(p));
}

const char* scattered_fprop(const Scattered& p, DType dtype, void* stream) {
  using namespace scattered;
  const Kernel kernel = pick(p, dtype);
  if (!kernel) return "the kernel for scattered groups is built for bf16, fp16, 1 x 1 and 3 x 3";
  if (p.warps < 1 || p.warps * 32 > kMostThreads) return "a block has 1 to 16 warps";
  if (p.pixel_bytes % 128 || p.width % 8) return "slots and columns are multiples of eight";
  const int64_t tiles = int64_t((p.batch + kImages - 1) / kImages) *
                        ((p.out_h + kRows - 1) / kRows) * ((p.out_w + kCols - 1) / kCols);
  if (!tiles) return nullptr;
  return launch(kernel, p, tiles, p.part_count, p.warps * 32, scattered_shared_bytes(p), stream);
}

}  // namespace hetconv::cuda
