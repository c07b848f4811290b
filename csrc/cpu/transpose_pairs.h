// SPDX-License-Identifier: Apache-2.0
// bfloat16 between pixels of channels and planes of pixels: a plane has a channel of 32 pixels in a
// vector, and two planes make the pairs of 2 x 16 pixels.
#pragma once
#include "micro_pairs.h"
#include "pack_pairs.h"
#include "transpose.h"

namespace hetconv {
namespace HETCONV_NS {

// Both halves of lane l hold l.
HC_INLINE __m512i lane_numbers() {
  return _mm512_setr_epi32(0x00000, 0x10001, 0x20002, 0x30003, 0x40004, 0x50005, 0x60006, 0x70007,
                           0x80008, 0x90009, 0xa000a, 0xb000b, 0xc000c, 0xd000d, 0xe000e, 0xf000f);
}
// Numbers of elements of two vectors, the second's from 32 on, as permutex2var takes them. Every
// other one, from `first` on.
HC_INLINE __m512i pick_alternate(int first) {
  // The halves of lane l are elements 4 l + first and 4 l + 2 + first.
  const __m512i fours = _mm512_slli_epi16(lane_numbers(), 2);
  return _mm512_add_epi16(fours, _mm512_set1_epi32((first + 2) << 16 | first));
}
// Of both vectors, elements first + l in the halves of lane l.
HC_INLINE __m512i pick_interleaved(int first) {
  return _mm512_add_epi16(lane_numbers(), _mm512_set1_epi32((first + 32) << 16 | first));
}

struct Halves {
  HC_INLINE void split(__m512i* v) { permute(v, pick_alternate(0), pick_alternate(1)); }
  HC_INLINE void join(__m512i* v) { permute(v, pick_interleaved(0), pick_interleaved(16)); }
  HC_INLINE void permute(__m512i* v, __m512i first, __m512i second) {
    const __m512i low = _mm512_permutex2var_epi16(v[0], first, v[1]);
    v[1] = _mm512_permutex2var_epi16(v[0], second, v[1]);
    v[0] = low;
  }
  static constexpr int pixel(int i, int k) { return 16 * i + k; }
};

// The pairs of two channels for `pixels` pixels, rounded up to 32.
static inline void gather_pair(const bf16* lower, const bf16* upper, int64_t pixels, float* pairs) {
  for (int64_t p = 0; p < pixels; p += kTransposed<bf16>) {
    __m512i v[] = {load_64(lower + p), load_64(upper + p)};
    Halves::join(v);
    store_64(pairs + p, v[0]);
    store_64(pairs + p + 16, v[1]);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
