// SPDX-License-Identifier: Apache-2.0
// One axis of a packed band: which input coordinate each band entry holds, and where each tap
// starts.
//
// Example: 4 outputs, K = 3, stride 1, dilation 1.
//   shared: entries 0..5 hold inputs -p..5-p; tap k starts at entry k, neighbouring outputs are 1
//   entry apart. copies: entries 4k..4k+3 hold the inputs of tap k; no entry is useless, but inputs
//   are stored K times. phases (stride 2): even inputs first, odd inputs after, so that
//   neighbouring outputs are 1 entry apart.
#pragma once
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

struct Piece {
  int e0, len, rel, istride;
};  // entry e0 + j holds input origin + rel + j * istride

struct Axis {
  int pieces, entries, step, count;
  Piece piece[kMaxKernel];
  int start[kMaxKernel];  // entry of tap k for output 0
  int piece_of[kMaxKernel];
};

static inline void axis_shared(Axis* a, int K, int s, int d, int count) {
  a->pieces = 1;
  a->count = count;
  a->step = s;
  a->entries = (count - 1) * s + (K - 1) * d + 1;
  a->piece[0] = Piece{0, a->entries, 0, 1};
  for (int k = 0; k < K; ++k) {
    a->start[k] = k * d;
    a->piece_of[k] = 0;
  }
}

static inline void axis_copies(Axis* a, int K, int s, int d, int count) {
  a->pieces = K;
  a->count = count;
  a->step = 1;
  a->entries = K * count;
  for (int k = 0; k < K; ++k) {
    a->piece[k] = Piece{k * count, count, k * d, s};
    a->start[k] = k * count;
    a->piece_of[k] = k;
  }
}

static inline void axis_phases(Axis* a, int K, int s, int d, int count) {
  a->pieces = 0;
  a->count = count;
  a->step = 1;
  a->entries = 0;
  // Of a huge stride, only the phases that some tap has.
  for (int phase = 0; phase < s && phase <= (K - 1) * d; ++phase) {
    int lowest = -1, highest = -1;
    for (int k = 0; k < K; ++k)
      if ((k * d) % s == phase) {
        if (lowest < 0) lowest = k * d / s;
        highest = k * d / s;
        a->start[k] = a->entries + highest - lowest;
        a->piece_of[k] = a->pieces;
      }
    if (lowest < 0) continue;
    const int len = count + highest - lowest;
    a->piece[a->pieces++] = Piece{a->entries, len, phase + lowest * s, s};
    a->entries += len;
  }
}

// So that neighbouring outputs are 1 entry apart, with at most K entries an output.
static inline void axis_neighbours(Axis* a, int K, int s, int d, int count) {
  if (s == 1)
    axis_shared(a, K, s, d, count);
  else
    axis_phases(a, K, s, d, count);
  if (a->entries > K * count) axis_copies(a, K, s, d, count);
}

// Length of a piece when only n of `count` outputs are wanted.
HC_INLINE int piece_length(const Axis& a, const Piece& p, int n) {
  return p.len - (a.count - n) * a.step;
}

// Of `len` entries holding inputs first, first + istride, ...: the range [*lo, *hi) that lies
// inside [0, size).
HC_INLINE void inside(int first, int istride, int len, int size, int* lo, int* hi) {
  *lo = first >= 0 ? 0 : least(len, (-1 - first) / istride + 1);
  *hi = first >= size ? 0 : least(len, (size - 1 - first) / istride + 1);
  if (*hi < *lo) *hi = *lo;
}

// Whether taps of a kernel row that share a permutation read neighbouring pixels: the offsets of
// their columns, nv to a tap.
static inline bool neighbours(int triples, int twins, const int* off, int nv, ptrdiff_t in_pixel) {
  if (triples + twins == 0) return false;
  const int taps = triples ? 1 : 2;  // from the first column of a row to its second
  return off[nv] - off[0] == taps * in_pixel;
}

}  // namespace HETCONV_NS
}  // namespace hetconv
