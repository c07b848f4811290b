// SPDX-License-Identifier: Apache-2.0
// AVX-512 with instructions for bfloat16: what they change; the rest is isa_avx512.cpp.
#if defined(__x86_64__)
#define HETCONV_NS avx512bf16
#define HETCONV_VECTOR_BYTES 64
#include "fprop_pixel_pairs.h"
#include "isa.h"
#include "micro_pairs.h"
#include "pack_pairs.h"
#include "twin_images.h"

namespace hetconv {
namespace HETCONV_NS {

// What FiltersFprop multiplies: pairs of channels of a band as it came from memory.
struct PairColumns {
  using Band = bf16;
  using Segment = PairSegment;
  static const Segment* segments(const Lowered& L) { return L.paired; }
  static bool reads_vectors(const Segment& s) { return s.windows > 0 || s.gathers > 0; }
  // Whether it reads a copy of the band, and which one.
  static bool copies(const Segment& s) { return s.gathers > 0; }
  static int copy_of(const Segment& s) { return s.gather0; }
  static void copy(const Lowered& L, const Segment& s, const Band* band, int64_t pixels, int Cb,
                   Band* to) {
    gather_band(L, s, band, pixels, Cb, to);
  }
  static bool spans(const Lowered& L) { return L.span != 0; }
  static void patches(const Problem& p, const bf16* x, int KW, const Axis& ya, int oy, int ox,
                      int rows, int cols, int64_t row_elements, Band* band) {
    pack_patches(p, x, KW, ya, oy, ox, rows, cols, row_elements, band);
  }
  static bool in_place(int C, bool vectors) { return vectors ? C % VL<bf16> == 0 : C > 1; }
  static PairSteps steps(const Lowered& L, const Segment& s, const int* off,
                         ptrdiff_t in_pixel = 0) {
    PairSteps steps = {off + s.col0, s.runs, s.pairs, s.windows,
                       L.perms ? static_cast<const float*>(L.perms) + s.perm0 : nullptr};
    const int* windows = steps.off + s.runs + s.pairs;
    if (s.nv == 1 && neighbours(s.triples, s.twins, windows, 1, in_pixel)) {
      steps.triples = s.triples;
      steps.twins = s.twins;
    }
    return steps;
  }
  template <int NV> static int most_pixels(const PairSteps&) { return kMaxPixels; }
  template <int NV> static PairsKernel kernel(int mr) { return pairs_kernel_for<NV>(mr); }
};

// The same by Winograd: transformed inputs and weights are bfloat16, all sums float32.
struct WinogradPairs : PairColumns {
  static bool has_rest(const Segment& s) { return s.runs + s.pairs + s.windows > 0; }
  static int vectors_of(const WinogradPart& k) { return k.nv; }
  template <int NV> static PairSteps products(const Winograd& W, const WinogradPart& k) {
    return {W.offsets + k.off0, k.quads, k.singles, 0, nullptr};
  }
  template <int NV> static PairsKernel products_kernel(const WinogradPart&, int n) {
    return pairs_kernel_for<NV>(n);
  }
};

static bool fprop_bf16(const Lowered& L, OffsetCache* cache, const Problem& p, const void* packed) {
  if (L.winograd) return fprop_tiles<bf16, float, 2, WinogradPairs>(L, cache, p, packed);
  if (L.pixel_pairs) return fprop_pixel_pairs(L, cache, p, packed);
  return fprop<bf16, float, PairColumns>(L, cache, p, packed);
}

}  // namespace HETCONV_NS

extern const Bf16Kernels kernels_avx512bf16 = {avx512bf16::fprop_bf16, avx512bf16::pack_pairs,
                                               avx512bf16::wgrad_twins};

}  // namespace hetconv
#endif
