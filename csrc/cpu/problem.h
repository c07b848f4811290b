// SPDX-License-Identifier: Apache-2.0
// Plain data shared by every object of the engine. No inline functions here: an inline function
// compiled with AVX-512 flags could be the copy that the linker keeps for a machine without
// AVX-512.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../types.h"

namespace hetconv {

constexpr int kMaxKernel = 64;                // taps per axis
constexpr size_t kWorkspaceBytes = 2u << 20;  // per thread, whatever the image
constexpr int kFewestPixels = 16;             // in a row of a band whose pixels are in vectors
constexpr size_t kBandBytes = 320u << 10;  // what a packed band should fit in (part of an L2 cache)

constexpr size_t kImageBlockBytes = 640u << 10;   // small images side by side in one band
constexpr size_t kWgradBytes = 900u << 10;        // bands of input and output gradient together
constexpr size_t kChannelBandBytes = 640u << 10;  // the same with channels in vectors
constexpr size_t kSumsBytes = 256u << 10;         // of wgrad that each thread may keep a copy of
constexpr size_t kPlanarBandBytes = 512u << 10;   // a packed band with pixels in vectors
constexpr size_t kTransposeBytes = 384u << 10;    // accumulators that wait for their transposition
constexpr size_t kPooledBytes = 512u << 10;       // outputs that wait to be pooled
constexpr size_t kPooledBandBytes = 448u << 10;   // the band that they come from

enum class Form : int { filters = 0, pixels = 1 };

// A 4-D tensor by address and strides in elements, in the order image, channel, row, column.
struct View {
  char* data;
  int64_t sn, sc, sh, sw;
};

// Max-pooling of what a call computes: y (py, px) is the largest of the outputs (py * sh - pt + ky,
// px * sw - pl + kx) that exist. NaN wins.
struct Pool {
  int KH, KW, sh, sw, pt, pl;
  int Ho, Wo;  // pooled pixels
};

// One call. Output (oy, ox), tap (ky, kx) reads input (oy * sh - pt + ky * dh, ox * sw - pl + kx *
// dw), zero outside.
struct Problem {
  int64_t N;
  int C, H, W, F, Ho, Wo, KH, KW;
  int sh, sw, pt, pl, dh, dw;
  View x, y, res;     // res.data is null when there is no residual
  const void* scale;  // per filter, accumulation type, or null
  const void* shift;  // per filter, accumulation type, or null
  Act act;
  int threads;
  const Pool* pool;  // or null; then y is pooled, with filters innermost
};

// dy as the input of a 1x1 convolution: what packs x packs it too.
inline Problem as_pointwise(const Problem& p) {
  Problem q = p;
  q.x = p.y;
  q.C = p.F;
  q.H = p.Ho;
  q.W = p.Wo;
  q.sh = q.sw = q.dh = q.dw = 1;
  q.pt = q.pl = 0;
  return q;
}

// One column of the implicit GEMM.
struct Column {
  int ky, kx;
  int channel;   // first of four neighbours in a quad; window start in a lane column
  int idle = 0;  // a split column that only keeps its vector in step: its weights are zero; of a
                 // pair, the channels that another pair has
};

// Filters in vectors: `lanes` filters fill nv vectors. Columns, in this order, from `col0`:
//   quads    four neighbouring channels of one tap, broadcast to every lane
//   singles  one channel of one tap, broadcast
//   split    nv Columns each, one per vector: every vector broadcasts a channel of its own
//   pairs    vector 0's, then vector 1's: two neighbouring channels of one tap, for a vector whose
//            first and second half of lanes read the same ones; then its halves, two Columns each:
//            the same for lanes whose halves read different channels. The lanes of a pair are
//            half as many filters, each twice: the lower channel in even lanes, the upper in odd.
//   lane columns: nv Columns each (one per vector); lane l of vector j reads channel + perm[l].
//            The first `straight` of them read channel + l (no permutation). Of the `permuted`, the
//            first 3 * triples are three neighbouring taps of a kernel row each, kx to kx + 2, and
//            the next 2 * twins are two, kx and kx + 2, which read the same channels by the same
//            permutation. alike: and so do both vectors, in all of these.
// Weights, from `w0`: [4 * quads + singles + split][nv * VL], [pairs + halves][2 * VL],
// [lane columns][nv * VL].
struct FilterSegment {
  int nv, lanes;
  int filter0;     // into filters[]
  int contiguous;  // filters ascend by one
  int merged;      // several groups: a lane may not have every broadcast column
  int quads, singles, split, straight, permuted;
  int triples, twins, alike;
  int pairs[2], halves[2];  // of vectors 0 and 1
  int64_t col0, w0;
  int paired() const { return pairs[0] + pairs[1] + halves[0] + halves[1]; }
  int64_t perm0;   // into perms[]: [permuted][nv][VL]
  int64_t taken0;  // into taken[]: [straight + permuted][nv][VL]
};

// Filters in vectors of bfloat16: a lane holds two channels of its filter. Columns from `col0`:
//   runs     eight neighbouring channels of one tap, four broadcasts of two
//   pairs    two neighbouring channels of one tap, broadcast
//   windows: nv Columns each (one per vector); lane l of vector j reads two of the 2 * VL channels
//            from `channel`, by the two 16-bit halves of perm[l]. The first 3 * triples and the
//            next 2 * twins are taps of one kernel row, as in FilterSegment.
// Where gathers > 0, these channels are numbers of gathered[]: the segment reads a copy of the band
// with only those channels, one after the other, so that each has a partner.
// Weights, from `w0`, in lanes of two: [4 * runs + pairs][nv * VL], [windows][nv * VL].
struct PairSegment {
  int nv, lanes;
  int filter0, contiguous;
  int runs, pairs, windows;
  int triples, twins;
  int gathers, gathered0;  // into gather[] from gather0, and into gathered[]
  int gather0;
  int64_t col0, w0;
  int64_t perm0;   // into perms[]: [windows][nv][VL]
  int64_t taken0;  // into taken[]: [windows][nv][VL], kLower and kUpper
};
// Of a band's 2 * VL channels from `from`, those of numbers perm[] go to a copy from `to` on.
struct Gather {
  int from, to;
  int64_t perm0;
};
// Pixels in vectors of bfloat16: pair q of a gather is of channels gathered[channel0 + 2 q] and the
// next, which is -1 where there is none; a tile's columns from `col0` have the pair in place of the
// channel. Weights, from `w0`: [steps][filters], in lanes of two.
struct PixelPairGather {
  int pairs, channel0;
};
struct PixelPairTile {
  int filters, filter0, gather, steps;
  int64_t col0, w0;
};
struct PixelPairs {
  const PixelPairTile* tiles;
  int count;
  const PixelPairGather* gathers;
  int most_pairs;  // of a gather
};
// Of the two channels of a lane, those that count; in Column::idle those that do not.
constexpr int kLower = 1, kUpper = 2;

// Pixels in vectors: nf filters that share columns; weights from `w0`: [ncols][nf].
// whole_rows: few filters, and columns come in runs of all KW taps of a kernel row.
struct PixelTile {
  int nf, filter0, ncols, whole_rows;
  int64_t col0, w0;
};

struct Winograd;  // winograd.h

struct Lowered {
  Form form;
  int accumulate;  // pixels only: a filter is the sum of several tiles
  int vl;          // lanes of the accumulation type
  int F, C, KH, KW;
  int span;   // paired only: channels are numbered on through a row of taps, C to a tap
  int count;  // segments or tiles
  const FilterSegment* segments;
  const PixelTile* tiles;
  const PairSegment* paired;  // in place of segments, or null
  const Gather* gather;
  const int* gathered;  // channels
  const int* filters;   // filter ids, segment by segment
  const Column* columns;
  int64_t ncolumns;
  const void* perms;     // lane indices as integers of the size of the accumulation type
  const uint8_t* taken;  // whether a lane has a weight in a lane column
  const int* live;       // channels read by some filter, ascending
  int nlive;
  const int* plane;          // channel -> index in live, or -1
  const int* ascending;      // positions in filters[] by filter id; empty when tiles accumulate
  const int* identity;       // 0, 1, ...: F entries, or max_pixel_filters if that is more
  const uint8_t* mask;       // [F][C][KH][KW]
  int64_t packed;            // elements of the packed weights
  const Winograd* winograd;  // added to the segments, or null
  const PixelPairs* pixel_pairs;  // in place of tiles, or null
};

// Column offsets depend on the band layout only; the plan keeps the last few.
struct OffsetKey {
  int v[2 * kMaxKernel + 4];
};
struct OffsetCache;
const int* offsets_find(OffsetCache*, const OffsetKey&);
const int* offsets_keep(OffsetCache*, const OffsetKey&, int* fresh,
                        size_t bytes);  // takes ownership of `fresh` (malloc)

[[noreturn]] void out_of_memory();
void* workspace(size_t bytes);  // this thread's, 64-byte aligned, kept between calls
// Larger outputs are written past the caches, see non_temporal.h: the size of the last-level cache,
// unless it is set.
int64_t non_temporal_bytes();
void set_non_temporal_bytes(int64_t more_than);

// One weight tensor as seen by a plan: element (f, c, ky, kx) at data + offset of the strides.
struct WeightView {
  const char* data;
  int64_t sf, sc, sh, sw;
};

struct ChannelLowered;  // channels.h

struct Kernels {
  const char* name;
  int vector_bytes;
  int max_pixel_filters;  // filters of a pixels-in-vectors tile
  // Tiles of wgrad, the widest for each number of filters: columns of pixels, windows of channels.
  const int* wgrad_columns;
  int window_filters;
  const int* windows;
  int permuted;
  const int* permuted_windows;
  // False: it cannot be pooled as it is computed, and nothing was written.
  bool (*fprop[4])(const Lowered&, OffsetCache*, const Problem&, const void* packed);
  void (*pack[4])(const Lowered&, const WeightView&, DType from, void* packed, int threads);
  void (*wgrad_pixels[4])(const Lowered&, OffsetCache*, const Problem&, void* dw,
                          const int64_t* strides);
  void (*wgrad_channels[4])(const ChannelLowered&, const Problem&, void* dw,
                            const int64_t* strides);
  bool pairs = false;         // filters in vectors of bfloat16 are those of PairSegment
  bool half_vectors = false;  // an operation takes as long as two loads: none waits for its operand
};

// What an ISA with instructions of its own for bfloat16 puts in place of another's.
struct Bf16Kernels {
  bool (*fprop)(const Lowered&, OffsetCache*, const Problem&, const void* packed);
  void (*pack)(const Lowered&, const WeightView&, DType from, void* packed, int threads);
  void (*wgrad_channels)(const ChannelLowered&, const Problem&, void* dw, const int64_t* strides);
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Bf16Kernels kernels_avx512bf16;  // the rest is kernels_avx512

}  // namespace hetconv
