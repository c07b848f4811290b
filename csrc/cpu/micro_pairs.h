// SPDX-License-Identifier: Apache-2.0
// Filters in vectors, of bfloat16: each lane holds two channels of one filter and takes two
// products in one instruction, summed in float32.
#pragma once
#include "choose.h"
#include "emit.h"
#include "micro_filters.h"

namespace hetconv {
namespace HETCONV_NS {

// The bits of p[0] and p[1] in every lane.
HC_INLINE Vec<float> splat_both(const bf16* p) {
  int32_t both;
  memcpy(&both, p, sizeof both);
  return (Vec<float>)_mm512_set1_epi32(both);
}
// The 32 channels from p, lane l those of numbers perm[l] (lower half: its first).
HC_INLINE Vec<float> permute_both(const bf16* p, Vec<float> perm) {
  return (Vec<float>)_mm512_permutexvar_epi16((__m512i)perm, _mm512_loadu_si512(p));
}
// sum + x's first * w's first + x's second * w's second, of each lane.
HC_INLINE Vec<float> dot_both(Vec<float> sum, Vec<float> x, Vec<float> w) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}

// Lanes that read two channels of their own.
struct PermutedPairs {
  using Band = bf16;
  using Sum = float;
  HC_INLINE Vec<float> read(const bf16* pixel, Vec<float> perm) {
    return permute_both(pixel, perm);
  }
  HC_INLINE Vec<float> add(Vec<float> sum, Vec<float> x, Vec<float> w) {
    return dot_both(sum, x, w);
  }
};

struct PairSteps {
  const int* off;  // band offset of each column
  int runs, pairs, windows;
  const float* perms;          // [windows][NV] index vectors
  int triples = 0, twins = 0;  // of the windows; none where neighbouring taps are not neighbouring
                               // pixels
  TileEnd<bf16, float> end{};
};

using PairsKernel = void (*)(const bf16* a, ptrdiff_t ps, const PairSteps& s, const float* w,
                             float* o, ptrdiff_t os);

// As filters_kernel; w in lanes, each of two channels.
template <int MR, int NV>
static void pairs_kernel(const bf16* a, ptrdiff_t ps, const PairSteps& s, const float* w, float* o,
                         ptrdiff_t os) {
  using Tile = TilePixels<bf16, MR>;
  constexpr int L = VL<float>;
  Vec<float> acc[MR][NV];
  HC_UNROLL for (int i = 0; i < MR; ++i) HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] =
      Vec<float>{};
  const int* off = s.off;
  Tile t(ps);
  for (int q = 0; q < s.runs; ++q) {
    Tile::start(t, a + off[q]);
    HC_UNROLL for (int c = 0; c < 4; ++c) {
      Vec<float> b[NV];
      HC_UNROLL for (int j = 0; j < NV; ++j) b[j] = load<float>(w + (c * NV + j) * L);
      HC_UNROLL for (int i = 0; i < MR; ++i) {
        const Vec<float> x = splat_both(Tile::of(t, i) + 2 * c);
        HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = dot_both(acc[i][j], b[j], x);
      }
    }
    w += 4 * NV * L;
  }
  off += s.runs;
  for (int q = 0; q < s.pairs; ++q) {
    Tile::start(t, a + off[q]);
    Vec<float> b[NV];
    HC_UNROLL for (int j = 0; j < NV; ++j) b[j] = load<float>(w + j * L);
    HC_UNROLL for (int i = 0; i < MR; ++i) {
      const Vec<float> x = splat_both(Tile::of(t, i));
      HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = dot_both(acc[i][j], b[j], x);
    }
    w += NV * L;
  }
  off += s.pairs;
  const float* perms = s.perms;
  int apart = s.windows;
  if constexpr (NV == 1) {
    rows_of_taps<PermutedPairs, 3, 1>(acc, s.triples, false, a, ps, off, w, perms);
    rows_of_taps<PermutedPairs, 2, 2>(acc, s.twins, false, a, ps, off, w, perms);
    apart -= 3 * s.triples + 2 * s.twins;
  }
  for (int q = 0; q < apart; ++q) {
    HC_UNROLL for (int j = 0; j < NV; ++j) {
      Tile::start(t, a + off[q * NV + j]);
      const Vec<float> b = load<float>(w + j * L), perm = load<float>(perms + (q * NV + j) * L);
      HC_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] =
          dot_both(acc[i][j], b, permute_both(Tile::of(t, i), perm));
    }
    w += NV * L;
  }
  if (s.end.y) return finish_tile(acc, s.end);
  HC_UNROLL for (int i = 0; i < MR; ++i) HC_UNROLL for (int j = 0; j < NV; ++j)
      store<float>(o + i * os + j * L, acc[i][j]);
}

template <int NV> static PairsKernel pairs_kernel_for(int mr) {
  return choose<PairsKernel, kMaxPixels>(mr, [](auto m) { return pairs_kernel<m(), NV>; });
}

}  // namespace HETCONV_NS
}  // namespace hetconv
