// SPDX-License-Identifier: Apache-2.0
// Micro-kernel. Filters in vectors: MR pixels x NV vectors of filters stay in registers over all
// columns of a segment.
#pragma once
#include "choose.h"
#include "emit.h"

namespace hetconv {
namespace HETCONV_NS {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxPixels = 14;  // 14 x 2 accumulators of 32 registers
// Where taps share permuted inputs: beside 3 weights for each vector, one input and its
// permutation.
constexpr int kMaxRowPixels[3] = {0, 14, 12};
constexpr bool kVectorsTogether = true;
#else
constexpr int kMaxPixels = 6;  // 6 x 2 of 16
constexpr int kMaxRowPixels[3] = {0, 6, 5};
constexpr bool kVectorsTogether = false;  // 3 weights of one vector at a time
#endif

template <class A> struct FilterSteps {
  const int* off;  // band offset of each column
  int quads, singles, split, straight, permuted;
  const int *pairs, *halves;   // of each vector
  bool paired;                 // whether any of those is not zero
  const A* perms;              // [permuted][NV] index vectors
  int triples = 0, twins = 0;  // of the permuted; none where neighbouring taps are not neighbouring
                               // pixels
  bool alike = false;
  TileEnd<A, A> end{};
};

// p[0] in even lanes, p[1] in odd ones.
template <class A> HC_INLINE Vec<A> splat_pair(const A* p) {
  if constexpr (sizeof(A) == 4) {
    double both;
    memcpy(&both, p, sizeof both);
    return (Vec<A>)splat<double>(both);
  } else {
    Vec<A> v;
    HC_UNROLL for (int l = 0; l < VL<A>; ++l) v[l] = p[l % 2];
    return v;
  }
}

// The pairs of all vectors: one load serves two multiply-adds. Sums to o: [MR][NV] vectors.
template <class A, int MR, int NV>
static __attribute__((noinline)) void pairs_kernel(const A* a, ptrdiff_t ps,
                                                   const FilterSteps<A>& s, const int* off,
                                                   const A* w, A* o) {
  for (int j = 0; j < NV; ++j) {
    Vec<A> acc[MR][2];
    HC_UNROLL for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = Vec<A>{};
    for (int q = 0; q < s.pairs[j]; ++q) {
      const A* p = a + *off++;
      const Vec<A> b0 = load<A>(w), b1 = load<A>(w + VL<A>);
      HC_UNROLL for (int i = 0; i < MR; ++i) {
        const Vec<A> x = splat_pair<A>(p + i * ps);
        acc[i][0] += x * b0;
        acc[i][1] += x * b1;
      }
      w += 2 * VL<A>;
    }
    for (int q = 0; q < s.halves[j]; ++q) {
      const A *p0 = a + off[0], *p1 = a + off[1];
      const Vec<A> b0 = load<A>(w), b1 = load<A>(w + VL<A>);
      HC_UNROLL for (int i = 0; i < MR; ++i) {
        acc[i][0] += splat_pair<A>(p0 + i * ps) * b0;
        acc[i][1] += splat_pair<A>(p1 + i * ps) * b1;
      }
      off += 2;
      w += 2 * VL<A>;
    }
    HC_UNROLL for (int i = 0; i < MR; ++i)
        store<A>(o + (i * NV + j) * VL<A>, add_pairs<A>(acc[i][0], acc[i][1]));
  }
}

template <class A>
using FiltersKernel = void (*)(const A* a, ptrdiff_t ps, const FilterSteps<A>& s, const A* w, A* o,
                               ptrdiff_t os);

// The pixels of a tile by four base pointers and two distances, so that every operand is one
// address of the processor. The compiler would rather keep each distance in a register of its own,
// and then in memory: `start` hides from it that they stay the same.
template <class A, int MR> struct TilePixels {
  ptrdiff_t once, thrice;
  const A* at[(MR + 3) / 4];

  explicit TilePixels(ptrdiff_t ps) : once(ps), thrice(3 * ps) {}
  HC_INLINE void start(TilePixels& t, const A* p) {
    asm("" : "+r"(t.once), "+r"(t.thrice));
    HC_UNROLL for (int g = 0; g < (MR + 3) / 4; ++g) {
      t.at[g] = g ? t.at[g - 1] + 4 * t.once : p;
      asm("" : "+r"(t.at[g]));
    }
  }
  HC_INLINE const A* of(const TilePixels& t, int i) {
    const A* p = t.at[i / 4];
    return i % 4 == 0 ? p : i % 4 == 1 ? p + t.once : i % 4 == 2 ? p + 2 * t.once : p + t.thrice;
  }
};

// Lanes that read channels of their own: what they read of a pixel of the band, by what is packed
// in `perm`, and how it is multiplied.
template <class A> struct PermutedLanes {
  using Band = A;
  using Sum = A;
  HC_INLINE Vec<A> read(const A* pixel, Vec<A> perm) {
    return permute_lanes<A>(load<A>(pixel), (typename Lane<A>::ivec)perm);
  }
  HC_INLINE Vec<A> add(Vec<A> sum, Vec<A> x, Vec<A> w) { return sum + x * w; }
};

// COUNT taps of a kernel row, STEP apart, of vectors J to J + NJ: each input pixel is permuted once
// for all the outputs that read it. T: as PermutedLanes.
template <class T, int COUNT, int STEP, int J, int NJ, int MR, int NV, class A = typename T::Sum>
HC_INLINE void row_of_taps(Vec<A> (&acc)[MR][NV], const typename T::Band* a, ptrdiff_t ps,
                           const A* w, const A* perm) {
  constexpr int pixels = MR + (COUNT - 1) * STEP;
  using Tile = TilePixels<typename T::Band, pixels>;
  Tile t(ps);
  Tile::start(t, a);
  const Vec<A> index = load<A>(perm + J * VL<A>);
  Vec<A> b[COUNT][NJ];
  HC_UNROLL for (int k = 0; k < COUNT; ++k) HC_UNROLL for (int j = 0; j < NJ; ++j) b[k][j] =
      load<A>(w + (k * NV + J + j) * VL<A>);
  HC_UNROLL for (int q = 0; q < pixels; ++q) {
    const Vec<A> x = T::read(Tile::of(t, q), index);
    HC_UNROLL for (int k = 0; k < COUNT; ++k) {
      const int i = q - k * STEP;
      if (i < 0 || i >= MR) continue;
      HC_UNROLL for (int j = 0; j < NJ; ++j) acc[i][J + j] = T::add(acc[i][J + j], x, b[k][j]);
    }
  }
}

template <class T, int COUNT, int STEP, int MR, int NV, class A = typename T::Sum>
HC_INLINE void rows_of_taps(Vec<A> (&acc)[MR][NV], int rows, bool alike, const typename T::Band* a,
                            ptrdiff_t ps, const int*& off, const A*& w, const A*& perm) {
  for (int r = 0; r < rows; ++r) {
    if constexpr (NV == 1) {
      row_of_taps<T, COUNT, STEP, 0, 1>(acc, a + off[0], ps, w, perm);
    } else if (kVectorsTogether && alike) {
      row_of_taps<T, COUNT, STEP, 0, NV>(acc, a + off[0], ps, w, perm);
    } else {
      row_of_taps<T, COUNT, STEP, 0, 1>(acc, a + off[0], ps, w, perm);
      row_of_taps<T, COUNT, STEP, 1, 1>(acc, a + off[1], ps, w, perm);
    }
    off += COUNT * NV;
    w += COUNT * NV * VL<A>;
    perm += COUNT * NV * VL<A>;
  }
}

// a: first pixel in the band, ps: distance of neighbouring pixels, w: packed weights, o: MR rows of
// NV vectors, os apart.
template <class A, int MR, int NV>
static void filters_kernel(const A* a, ptrdiff_t ps, const FilterSteps<A>& s, const A* w, A* o,
                           ptrdiff_t os) {
  using Tile = TilePixels<A, MR>;
  Vec<A> acc[MR][NV];
  const int* off = s.off;
  if (s.paired) {
    A sums[MR * NV * VL<A>];
    const int* po = off + s.quads + s.singles + s.split * NV;
    pairs_kernel<A, MR, NV>(a, ps, s, po,
                            w + (4 * s.quads + s.singles + s.split) * ptrdiff_t(NV * VL<A>), sums);
    HC_UNROLL for (int i = 0; i < MR; ++i) HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] =
        load<A>(sums + (i * NV + j) * VL<A>);
  } else {
    HC_UNROLL for (int i = 0; i < MR; ++i) HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] =
        Vec<A>{};
  }
  Tile t(ps);
  for (int q = 0; q < s.quads; ++q) {
    Tile::start(t, a + off[q]);
    HC_UNROLL for (int c = 0; c < 4; ++c) {
      Vec<A> b[NV];
      HC_UNROLL for (int j = 0; j < NV; ++j) b[j] = load<A>(w + (c * NV + j) * VL<A>);
      HC_UNROLL for (int i = 0; i < MR; ++i) {
        const Vec<A> x = splat<A>(Tile::of(t, i)[c]);
        HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] += x * b[j];
      }
    }
    w += 4 * NV * VL<A>;
  }
  off += s.quads;
  for (int q = 0; q < s.singles; ++q) {
    Tile::start(t, a + off[q]);
    Vec<A> b[NV];
    HC_UNROLL for (int j = 0; j < NV; ++j) b[j] = load<A>(w + j * VL<A>);
    HC_UNROLL for (int i = 0; i < MR; ++i) {
      const Vec<A> x = splat<A>(*Tile::of(t, i));
      HC_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] += x * b[j];
    }
    w += NV * VL<A>;
  }
  off += s.singles;
  for (int q = 0; q < s.split; ++q) {
    HC_UNROLL for (int j = 0; j < NV; ++j) {
      Tile::start(t, a + off[q * NV + j]);
      const Vec<A> b = load<A>(w + j * VL<A>);
      HC_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] += splat<A>(*Tile::of(t, i)) * b;
    }
    w += NV * VL<A>;
  }
  off += s.split * NV;
  for (int j = 0; s.paired && j < NV; ++j) {
    off += s.pairs[j] + 2 * s.halves[j];
    w += 2 * VL<A> * (s.pairs[j] + s.halves[j]);
  }
  for (int q = 0; q < s.straight; ++q) {
    HC_UNROLL for (int j = 0; j < NV; ++j) {
      Tile::start(t, a + off[q * NV + j]);
      const Vec<A> b = load<A>(w + j * VL<A>);
      HC_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] += load<A>(Tile::of(t, i)) * b;
    }
    w += NV * VL<A>;
  }
  off += s.straight * NV;
  const A* perm = s.perms;
  int apart = s.permuted;
  if constexpr (MR <= kMaxRowPixels[NV]) {
    rows_of_taps<PermutedLanes<A>, 3, 1>(acc, s.triples, s.alike, a, ps, off, w, perm);
    rows_of_taps<PermutedLanes<A>, 2, 2>(acc, s.twins, s.alike, a, ps, off, w, perm);
    apart -= 3 * s.triples + 2 * s.twins;
  }
  for (int q = 0; q < apart; ++q) {
    HC_UNROLL for (int j = 0; j < NV; ++j) {
      Tile::start(t, a + off[q * NV + j]);
      const Vec<A> b = load<A>(w + j * VL<A>);
      const typename Lane<A>::ivec index =
          (typename Lane<A>::ivec)load<A>(perm + (q * NV + j) * VL<A>);
      HC_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] +=
          permute_lanes<A>(load<A>(Tile::of(t, i)), index) * b;
    }
    w += NV * VL<A>;
  }
  if (s.end.y) return finish_tile(acc, s.end);
  HC_UNROLL for (int i = 0; i < MR; ++i) HC_UNROLL for (int j = 0; j < NV; ++j)
      store<A>(o + i * os + j * VL<A>, acc[i][j]);
}

template <class A, int NV> static FiltersKernel<A> filters_kernel_for(int mr) {
  return choose<FiltersKernel<A>, kMaxPixels>(mr,
                                              [](auto m) { return filters_kernel<A, m(), NV>; });
}

}  // namespace HETCONV_NS
}  // namespace hetconv
