// SPDX-License-Identifier: Apache-2.0
// wgrad with channels in vectors: what a Support becomes. Plain data, as in problem.h.
//
// Channels and filters are packed by vectors of VL lanes. A window is one vector of channels seen
// through one tap; a tile holds the sums of `nf` filters x `nv` windows. Example: HetConv with 64
// channels and filters, p = 4, VL = 16. 16 filters of one group read 4 windows of the centre tap
// and 8 windows of the ring, all of them whole: 12 windows, 2 x 4 tiles of 8 x 3.
#pragma once
#include "problem.h"

namespace hetconv {

struct ChannelWindow {
  int ky, kx;
  int vector;  // of packed channels
};

// permuted == 0: the sums are (filter first + i of the vector) x window, the filter broadcast.
// permuted == 1: lane l of row i pairs filter perm[i][l] of the vector with channel l of the
// window.
struct ChannelTile {
  int permuted, vector, first;
  int nf, nv;
  int whole;  // no dead weight but in idle lanes
  int window0;
  int64_t perm0;  // into perms and taken, in lanes: [nf][VL]
  int64_t sum0;   // into the sums: [nf][nv][VL]
};

// Channels and filters that are packed together, and the tiles that read them.
struct ChannelUnit {
  int x0, nx;  // vectors of channels
  int y0, ny;  // vectors of filters
  int tile0, tiles;
};

struct ChannelLowered {
  int vl, F, C, KH, KW;
  int units, tiles;
  int most_x, most_y;            // vectors of the largest unit
  int scattered_x, scattered_y;  // some vector is not a run of neighbours, or is packed twice
  const ChannelUnit* unit;
  const ChannelTile* tile;
  const ChannelWindow* window;
  int64_t windows, sums;
  const int64_t* work;     // [tiles + 1] multiply-adds of the tiles before
  const int* channels;     // [x vectors][VL] channel of each lane, or -1
  const int* planes;       // the same as an index into live
  const int* channel_run;  // [x vectors] lanes from the first that are neighbours, the rest idle
  const int* filters;      // [y vectors][VL] filter of each lane, or -1
  const int* filter_run;
  const int* live;  // channels read by some filter, ascending
  int nlive;
  const int* plane;     // channel -> index in live, or -1
  const int* identity;  // 0 .. F-1
  const void* perms;    // lane indices as integers of the size of the accumulation type
  const uint8_t* taken;
  const uint8_t* mask;  // [F][C][KH][KW]
};

}  // namespace hetconv
