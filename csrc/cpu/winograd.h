// SPDX-License-Identifier: Apache-2.0
// fprop by Winograd's F(2x2, 3x3), F(4x4, 3x3) and F(3x3, 4x4): what a Support becomes. Plain data,
// as in problem.h.
//
// The outputs of a tile are A^T [sum over channels of (G g G^T) * (B^T d B)] A: 16 products of a
// channel and a filter in place of 36, or 36 in place of 144. The channels of a filter that have
// all nine taps are multiplied that way; what is left of it (HetConv's centre taps) is a
// FilterSegment as ever, and is added. Example: HetConv with 64 channels and filters, p = 4: 16
// channels of 4 products an output and 48 of one, 112 in place of 192.
//
// F(3x3, 4x4) is for layers of stride 2 that read few channels by 7 x 7 or 8 x 8 taps, as the first
// of many networks does. Of the image's four phases (its even or odd rows, and columns, counted
// from the padded corner) each is a channel of its own, which stride 1 reads by 4 x 4 taps: 4
// products an output and channel in place of 16, or of the 12.25 that exist.
//
// Transformed inputs lie [position][tile][width], sums [position][tile][nv * VL]. In bfloat16 the
// former are rounded to it, which F(2x2, 3x3) bears: its transforms add and never scale.
#pragma once
#include "problem.h"

namespace hetconv {

// Of a transformed tile of M x M outputs: taps along an axis, and positions along one and in all.
constexpr int taps(int M) { return M == 3 ? 4 : 3; }
constexpr int side(int M) { return M + taps(M) - 1; }
constexpr int positions(int M) { return side(M) * side(M); }
// Phases of the input along an axis.
constexpr int phases(int M) { return M == 3 ? 2 : 1; }

// Channels that are transformed together, by whole vectors: vector i holds the VL channels from
// from[from0 + i].
struct WinogradUnit {
  int from0, vectors;
};

// `nv` vectors of a segment, from `vector`, that read the same channels of one unit: for each
// position a matrix product over columns from `off0`, which are places in a transformed tile.
// quads of four neighbouring places, then singles; or, of one vector where an operand is waited
// for, pairs of neighbouring places alone, as in FilterSegment.
// Weights from `w0`: [position][4 * quads + singles][nv * VL], or [position][pairs][2 * VL] in
// lanes of a pair. In bfloat16 each lane takes two neighbouring places: quads are four such pairs
// side by side, singles one, and weights [position][4 * quads + singles][nv * VL] lanes of two.
struct WinogradPart {
  int segment, vector, nv, unit;  // segment: of the plan's, or in bfloat16 of its paired ones
  int quads, singles, pairs;
  int64_t off0, w0;
};

struct Winograd {
  int tile;      // outputs along an axis: 2, 4 or, of phases, 3
  int channels;  // that are transformed: C, or of phases 4C: (2 row + column) C + channel
  const WinogradUnit* units;
  const int* from;
  int widest;  // vectors of the largest unit
  const WinogradPart* parts;
  int nparts;
  const int* part0;  // [segments + 1] into parts
  const int* offsets;
  const uint8_t* taken;  // of each pair of places, kLower and kUpper
  // [F][channels]: it is multiplied that way. The filter has all nine taps of the channel, or,
  // of a phase, any.
  const uint8_t* whole;
};

}  // namespace hetconv
