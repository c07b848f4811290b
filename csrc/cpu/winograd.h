// SPDX-License-Identifier: Apache-2.0
// fprop by Winograd's F(2x2, 3x3) and F(4x4, 3x3): what a Support becomes. Plain data, as in
// problem.h.
//
// The outputs of a tile are A^T [sum over channels of (G g G^T) * (B^T d B)] A: 16 products of a
// channel and a filter in place of 36, or 36 in place of 144. The channels of a filter that have
// all nine taps are multiplied that way; what is left of it (HetConv's centre taps) is a
// FilterSegment as ever, and is added. Example: HetConv with 64 channels and filters, p = 4: 16
// channels of 4 products an output and 48 of one, 112 in place of 192.
//
// Transformed inputs lie [position][tile][width], sums [position][tile][nv * VL].
#pragma once
#include "problem.h"

namespace hetconv {

// Of a transformed tile of M x M outputs.
constexpr int positions(int M) { return (M + 2) * (M + 2); }

// Channels that are transformed together, by whole vectors: vector i holds the VL channels from
// from[from0 + i].
struct WinogradUnit {
  int from0, vectors;
};

// `nv` vectors of a segment, from `vector`, that read the same channels of one unit: for each
// position a matrix product over columns from `off0`, which are places in a transformed tile.
//   nv == 2: quads of four neighbouring places, then singles
//   nv == 1: pairs of neighbouring places, as in FilterSegment
// Weights from `w0`: [position][4 * quads + singles][2 * VL], or [position][pairs][2 * VL] in lanes
// of a pair.
struct WinogradPart {
  int segment, vector, nv, unit;
  int quads, singles, pairs;
  int64_t off0, w0;
};

struct Winograd {
  int tile;  // outputs along an axis: 2 or 4
  const WinogradUnit* units;
  const int* from;
  int widest;  // vectors of the largest unit
  const WinogradPart* parts;
  int nparts;
  const int* part0;  // [segments + 1] into parts
  const int* offsets;
  const uint8_t* taken;  // of each pair, kLower and kUpper
  const uint8_t* whole;  // [F][C]: the filter has all nine taps of the channel
};

}  // namespace hetconv
