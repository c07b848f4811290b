// SPDX-License-Identifier: Apache-2.0
// The engine in 8 bits: plain data shared by its objects. No inline functions here (see problem.h).
//
// Activations are unsigned in the arithmetic: a signed one is read as x ^ 0x80, which is x + 128,
// and its zero point counts as much more. Weights are signed, sums are int32 and exact.
#pragma once
#include "problem.h"

namespace hetconv {

enum class Byte : int { u8 = 0, s8 = 1 };
enum class Int8Out : int { u8 = 0, s8 = 1, f32 = 2 };

constexpr int kUnit = 8;  // filters: blocks are one to four times as wide
constexpr int kQuad = 4;
constexpr int kWindow = 16;          // bytes that a shuffled step picks from
constexpr int kInt8TileFilters = 8;  // at most, where pixels are in vectors

// The channels of a pixel in the order that some blocks read them in, `pitch` bytes from the next.
// `classes` sets of channels, one after another, each ascending; set k is the bits of
// masks[mask0 + k * words ...], words = ceil(C / 64).
struct Int8Order {
  int channels, pitch, identity, classes;
  int64_t mask0, channel0;  // into masks[] and channels[]
};

// One step reads four bytes for each filter: of tap (ky, kx), from byte `at` of its pixel on. A
// quad is the same for all filters; a shuffled step picks each filter's bytes from a window.
// `own`: which bytes of a quad no earlier step has read.
struct Int8Step {
  int16_t ky, kx;
  int32_t at;
  uint8_t own;
};

// Filters of a block that lie among the same 64 channels of a pixel of y, from `at` on. Channel
// at + j is lane pick[j] where bit j of `channels` is set; lane l is channel at + back[l] where bit
// l of `lanes` is.
struct Int8Spread {
  uint64_t channels;
  uint32_t lanes;
  int at;
  uint8_t pick[64], back[32];
};

// Filters in vectors. Weights, from `w0`: [quads][lanes][4], then for each shuffled step the bytes
// to pick [lanes][4] and the weights [lanes][4]. Of the shuffled steps the first 3 * triples and
// the next 2 * twins are taps of one kernel row that pick the same, see permuted_rows.h.
struct Int8Block {
  int lanes, filters;
  int filter0;     // into filters[]; lanes begin there in the vectors of each filter, too
  int contiguous;  // filters ascend by one
  int spreads;  // into spread[], of filters that are no neighbours; 0: they are stored one by one
  int64_t spread0;
  int order;
  int quads, shuffles;
  int triples, twins;
  int64_t step0, w0;
  int64_t picks0;  // into picks[]: [shuffles][lanes][4], 0x80 = nothing
  double cost;
};

// Pixels in vectors: quads of any channels, side by side, channels[channel0 + 4 q + j] of quad q.
struct Int8Gather {
  int quads;
  int64_t channel0;
};

// Filters that read the same quads of the same taps; of their steps, `at` is the quad. Weights,
// from `w0`: [steps][filters][4]; a byte of `own` that is not set has none.
struct Int8PixelTile {
  int filters, filter0, gather, steps;
  int64_t step0, w0;
};

struct Int8Lowered {
  int F, C, KH, KW;
  int span;   // quads go on into the next tap: pixels must lie C bytes apart
  int reach;  // bytes of a pixel that steps read of it, at most
  int blocks, orders;
  int lanes;  // of all blocks
  const Int8Block* block;
  const Int8Order* order;
  const Int8Step* steps;
  int64_t nsteps;
  const int* filters;  // by lane; -1: none
  const uint64_t* masks;
  const int* channels;
  const uint8_t* picks;
  const Int8Spread* spread;
  const uint8_t* mask;  // [F][C][KH][KW]
  int64_t packed;       // bytes
  int compress;         // this machine can pick bytes by a mask
  int permute;          // it can put the bytes of a vector in any order
  int tiles;            // of filters where pixels are in vectors; there are no blocks then
  int most_quads;       // of a tile
  const Int8PixelTile* tile;
  const Int8Gather* gather;
  bool pixels_in_vectors() const { return tiles != 0; }
};

// One call. Images are dense and channels_last: [N][H][W][C] bytes.
struct Int8Problem {
  int64_t N;
  int C, H, W, F, Ho, Wo;
  int sh, sw, pt, pl, dh, dw;
  const uint8_t* x;
  Byte x_type;
  int x_zero;
  void* y;
  Int8Out y_type;
  int y_zero;
  float low, high;
  const uint8_t* res;  // or null
  Byte res_type;
  int res_zero;
  float res_multiplier;
  bool bounded;             // no scaled sum, residual included, leaves int32
  const float* multiplier;  // per lane, see Int8Block
  const int32_t* bias;      // per lane; the zero point of x is in it
  int threads;
  const Pool* pool;  // or null; then y is pooled
};

// y = finish((a - za) * ma + (b - zb) * mb) over `count` elements; b may be null.
struct Int8Sum {
  int64_t count;
  const uint8_t *a, *b;
  Byte a_type, b_type;
  int a_zero, b_zero;
  float a_multiplier, b_multiplier;
  void* y;
  Int8Out y_type;
  int y_zero;
  float low, high;
  int threads;
};

// Images [N][H][W][C]: their means over H and W, or the greatest of each window.
struct Int8Images {
  int64_t N;
  int H, W, C;
  const uint8_t* x;
  Byte x_type;
  int x_zero;
  float multiplier;
  void* y;
  Int8Out y_type;
  int y_zero;
  float low, high;
  int threads;
  const Pool* pool;
};

struct Int8Kernels {
  const char* name;
  int most_units;       // of a block
  double shuffle_cost;  // of a shuffled step, in quads
  double row_cost;      // of one whose shuffle serves a row of taps
  // False: it cannot be pooled as it is computed, and nothing was written.
  bool (*fprop)(const Int8Lowered&, OffsetCache*, const Int8Problem&, const int8_t* packed);
  void (*sum)(const Int8Sum&);
  void (*mean)(const Int8Images&);
  void (*max_pool)(const Int8Images&);
  void (*quantize)(const float* x, int64_t count, float scale, int zero, Byte type, uint8_t* y,
                   int threads);
  bool signed_bytes = false;  // tiles read an activation as x - 128
  bool pixels = false;        // it can have pixels in vectors
};

extern const Int8Kernels int8_kernels_generic;
#if defined(__x86_64__)
extern const Int8Kernels int8_kernels_avx2;
extern const Int8Kernels int8_kernels_avxvnni;
extern const Int8Kernels int8_kernels_avx512vnni;
#endif
#if defined(__aarch64__)
extern const Int8Kernels int8_kernels_neondot;
#endif

}  // namespace hetconv
