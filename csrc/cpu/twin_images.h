// SPDX-License-Identifier: Apache-2.0
// wgrad of bfloat16 with channels in vectors: the same pixel of two images in one lane, so that any
// tap reads whole lanes, and one instruction takes the products of both. After the last of an odd
// number of images come zeros.
#pragma once
#include "micro_pairs.h"
#include "wgrad_channels.h"

namespace hetconv {
namespace HETCONV_NS {

// Storage of an element of two images.
struct twin {
  uint16_t bits;
};

struct TwinSource {
  const bf16* first;
  int64_t second;  // distance to the second image
  __mmask16 both;  // all lanes, or none: there is no second image

  friend TwinSource operator+(TwinSource p, int64_t n) { return {p.first + n, p.second, p.both}; }
  TwinSource& operator+=(int64_t n) {
    first += n;
    return *this;
  }
  // The bits of both.
  float operator[](int64_t n) const {
    const uint32_t bits = first[n].bits | (both ? uint32_t(first[n + second].bits) << 16 : 0);
    float lane;
    memcpy(&lane, &bits, sizeof lane);
    return lane;
  }
};
struct TwinImages {
  const bf16* first;
  int64_t count;
};
template <> struct Storage<twin> {
  using Images = TwinImages;
  using Source = TwinSource;
};
HC_INLINE TwinSource image_of(TwinImages x, int64_t n, int64_t stride) {
  return {x.first + 2 * n * stride, stride, __mmask16(2 * n + 1 < x.count ? 0xffff : 0)};
}
HC_INLINE const void* address(TwinSource p) { return p.first; }

template <class S, class A> HC_INLINE Vec<A> read_n(TwinSource p, int n) {
  const __mmask16 some = __mmask16((1u << n) - 1);
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p.first)),
                b = _mm512_cvtepu16_epi32(
                    _mm256_maskz_loadu_epi16(some & p.both, p.first + p.second));
  return (Vec<A>)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}
template <class S, class A> HC_INLINE Vec<A> read(TwinSource p) { return read_n<S, A>(p, 16); }

// What ChannelsWgrad multiplies.
struct TwoImages {
  using Storage = twin;
  struct Product {
    HC_INLINE Vec<float> add(Vec<float> sum, Vec<float> a, Vec<float> b) {
      return dot_both(sum, a, b);
    }
  };
  static TwinImages images(const View& v, int64_t count) {
    return {reinterpret_cast<const bf16*>(v.data), count};
  }
  static int64_t count(int64_t N) { return (N + 1) / 2; }
};

static void wgrad_twins(const ChannelLowered& L, const Problem& p, void* dw,
                        const int64_t* strides) {
  if (p.N > 1)
    wgrad_channels<bf16, float, TwoImages>(L, p, dw, strides);
  else
    wgrad_channels<bf16, float>(L, p, dw, strides);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
