// SPDX-License-Identifier: Apache-2.0
// Vectors of one ISA by GCC vector extensions: the same source is AVX-512, AVX2, SSE or NEON.
#pragma once
#include <cstring>
#include <utility>
#include "problem.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef HETCONV_NS
#error "define HETCONV_NS and HETCONV_VECTOR_BYTES before including vec.h"
#endif
#define HC_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define HC_UNROLL _Pragma("unroll")
#else
#define HC_UNROLL _Pragma("GCC unroll 64")
#endif

namespace hetconv {
namespace HETCONV_NS {

typedef float vec_f32 __attribute__((vector_size(HETCONV_VECTOR_BYTES)));
typedef double vec_f64 __attribute__((vector_size(HETCONV_VECTOR_BYTES)));
typedef float vecu_f32 __attribute__((vector_size(HETCONV_VECTOR_BYTES), aligned(4), may_alias));
typedef double vecu_f64 __attribute__((vector_size(HETCONV_VECTOR_BYTES), aligned(8), may_alias));
typedef int32_t vec_i32 __attribute__((vector_size(HETCONV_VECTOR_BYTES)));
typedef int64_t vec_i64 __attribute__((vector_size(HETCONV_VECTOR_BYTES)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A> struct Lane;
template <> struct Lane<float> {
  using vec = vec_f32;
  using vecu = vecu_f32;
  using ivec = vec_i32;
  using index = int32_t;
};
template <> struct Lane<double> {
  using vec = vec_f64;
  using vecu = vecu_f64;
  using ivec = vec_i64;
  using index = int64_t;
};
template <class A> using Vec = typename Lane<A>::vec;
template <class A> constexpr int VL = HETCONV_VECTOR_BYTES / int(sizeof(A));

template <class T> HC_INLINE T least(T a, T b) { return b < a ? b : a; }
template <class T> HC_INLINE T most(T a, T b) { return a < b ? b : a; }
template <class T> HC_INLINE T ceil_div(T a, T b) { return (a + b - 1) / b; }

template <class A> HC_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Lane<A>::vecu*>(p);
}
template <class A> HC_INLINE void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Lane<A>::vecu*>(p) = v;
}

template <class A> HC_INLINE Vec<A> splat(A a) {
  if constexpr (VL<A> == 16)
    return Vec<A>{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a};
  else if constexpr (VL<A> == 8)
    return Vec<A>{a, a, a, a, a, a, a, a};
  else if constexpr (VL<A> == 4)
    return Vec<A>{a, a, a, a};
  else
    return Vec<A>{a, a};
}

// Hides from the compiler where a value comes from, so that a product is not fused with what is
// added to it later: its bits are then the same in every place that it is inlined into.
template <class A> HC_INLINE void keep_rounded(Vec<A>& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
}

// ---- permutations: clang has GCC's vectors but not its __builtin_shuffle ----

// Lane l is that of a number index[l]; each index is below VL.
template <class A> HC_INLINE Vec<A> permute_lanes(Vec<A> a, typename Lane<A>::ivec index) {
#if defined(__clang__)
  Vec<A> r = {};
  for (int l = 0; l < VL<A>; ++l) r[l] = a[index[l]];
  return r;
#else
  return __builtin_shuffle(a, index);
#endif
}

// Of every 2 H lanes the first H of a, then of b (low), or the second H of each (high).
template <class A, int H, bool high, int... l>
HC_INLINE Vec<A> halves_of(Vec<A> a, Vec<A> b, std::integer_sequence<int, l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((l & H ? VL<A> : 0) + l - (l & H) + (high ? H : 0))...);
#else
  using I = typename Lane<A>::ivec;
  return __builtin_shuffle(a, b, I{((l & H ? VL<A> : 0) + l - (l & H) + (high ? H : 0))...});
#endif
}
template <class A, int H> HC_INLINE Vec<A> low_halves(Vec<A> a, Vec<A> b) {
  return halves_of<A, H, false>(a, b, std::make_integer_sequence<int, VL<A>>());
}
template <class A, int H> HC_INLINE Vec<A> high_halves(Vec<A> a, Vec<A> b) {
  return halves_of<A, H, true>(a, b, std::make_integer_sequence<int, VL<A>>());
}

// Even (0) or odd (1) lanes of a, then of b.
template <class A, int odd, int... l>
HC_INLINE Vec<A> every_other(Vec<A> a, Vec<A> b, std::integer_sequence<int, l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * l + odd)...);
#else
  using I = typename Lane<A>::ivec;
  return __builtin_shuffle(a, b, I{(2 * l + odd)...});
#endif
}
// Sums of neighbouring lanes: of a, then of b.
template <class A> HC_INLINE Vec<A> add_pairs(Vec<A> a, Vec<A> b) {
  const auto lanes = std::make_integer_sequence<int, VL<A>>();
  return every_other<A, 0>(a, b, lanes) + every_other<A, 1>(a, b, lanes);
}

// The first n of VL elements; the rest is zero. Reads nothing beyond them.
template <class A> HC_INLINE Vec<A> load_n(const A* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (Vec<A>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else
    return (Vec<A>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#else
  Vec<A> v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
template <class A> HC_INLINE void store_n(A* p, Vec<A> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// ---- storage types: one element ----
HC_INLINE float widen(bf16 s) {
  uint32_t u = uint32_t(s.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
HC_INLINE float widen(f16 s) {
  const uint32_t sign = uint32_t(s.bits & 0x8000u) << 16, e = (s.bits >> 10) & 31u,
                 m = s.bits & 1023u;
  uint32_t u;
  float f;
  if (e == 0) {
    f = float(m) * 5.9604644775390625e-8f;
    memcpy(&u, &f, 4);
    u |= sign;
  } else if (e == 31)
    u = sign | 0x7f800000u | (m << 13);
  else
    u = sign | ((e + 112u) << 23) | (m << 13);
  memcpy(&f, &u, 4);
  return f;
}
HC_INLINE float widen(float s) { return s; }
HC_INLINE double widen(double s) { return s; }

template <class S> struct Narrow;
template <> struct Narrow<float> {
  HC_INLINE float of(float v) { return v; }
};
template <> struct Narrow<double> {
  HC_INLINE double of(double v) { return v; }
};
template <> struct Narrow<bf16> {
  HC_INLINE bf16 of(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
    return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
};
template <> struct Narrow<f16> {
  HC_INLINE f16 of(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u)};
    if (u >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
    if (u < 0x38800000u) {  // subnormal: the adder rounds for us
      float a;
      memcpy(&a, &u, 4);
      a += 0.5f;
      memcpy(&u, &a, 4);
      return f16{uint16_t(sign | (u - 0x3f000000u))};
    }
    u += 0xfffu + ((u >> 13) & 1u);
    return f16{uint16_t(sign | ((u - 0x38000000u) >> 13))};
  }
};

// ---- storage types: VL elements ----
template <class S, class A> HC_INLINE Vec<A> read(const S* p) {
  if constexpr (sizeof(S) == sizeof(A)) return load<A>(reinterpret_cast<const A*>(p));
#if defined(__AVX512F__)
  else if constexpr (__is_same(S, bf16))
    // By a mask of all lanes: GCC 12 takes the other's for uninitialised.
    return (Vec<A>)((typename Lane<A>::ivec)_mm512_maskz_cvtepu16_epi32(
                        0xffff, _mm256_loadu_si256((const __m256i*)p))
                    << 16);
  else
    return (Vec<A>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  else if constexpr (__is_same(S, bf16))
    return (Vec<A>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
  else
    return (Vec<A>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  else if constexpr (__is_same(S, bf16))
    return (Vec<A>)vshll_n_u16(vld1_u16((const uint16_t*)p), 16);
  else
    return (Vec<A>)vcvt_f32_f16(vld1_f16((const float16_t*)p));
#else
  else {
    Vec<A> v = {};
    for (int i = 0; i < VL<A>; ++i) v[i] = widen(p[i]);
    return v;
  }
#endif
}
template <class S, class A> HC_INLINE Vec<A> read_n(const S* p, int n) {
  if constexpr (sizeof(S) == sizeof(A)) return load_n<A>(reinterpret_cast<const A*>(p), n);
#if defined(__AVX512BF16__)
  else if constexpr (__is_same(S, bf16))
    return (Vec<A>)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p)), 16);
#endif
  else {
    S t[VL<A>] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return read<S, A>(t);
  }
}
template <class S, class A> HC_INLINE void write(S* p, Vec<A> v) {
  if constexpr (sizeof(S) == sizeof(A)) store<A>(reinterpret_cast<A*>(p), v);
#if defined(__AVX512BF16__)
  else if constexpr (__is_same(S, bf16))
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
#if defined(__AVX512F__)
  else if constexpr (__is_same(S, f16))
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  else if constexpr (__is_same(S, f16))
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  else if constexpr (__is_same(S, f16))
    vst1_f16((float16_t*)p, vcvt_f16_f32((float32x4_t)v));
#endif
  else
    for (int i = 0; i < VL<A>; ++i) p[i] = Narrow<S>::of(v[i]);
}
template <class S, class A> HC_INLINE void write_n(S* p, Vec<A> v, int n) {
  if constexpr (sizeof(S) == sizeof(A)) store_n<A>(reinterpret_cast<A*>(p), v, n);
#if defined(__AVX512BF16__)
  else if constexpr (__is_same(S, bf16))
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
  else
    for (int i = 0; i < n; ++i) p[i] = Narrow<S>::of(v[i]);
}

// ---- where packing reads from ----
// A tensor by the address of its first element, and a place in one image. A storage type of which
// several images are read at once has its own.
template <class S> struct Storage {
  using Images = const S*;
  using Source = const S*;
};
template <class S> using Images = typename Storage<S>::Images;
template <class S> using Source = typename Storage<S>::Source;
template <class S> HC_INLINE const S* image_of(const S* x, int64_t n, int64_t stride) {
  return x + n * stride;
}
HC_INLINE const void* address(const void* p) { return p; }

// ---- transposition of a VL x VL block held in vectors: log2(VL) rounds that swap off-diagonal
// blocks ----
template <class A, int H> HC_INLINE void swap_blocks(Vec<A>* r) {
  HC_UNROLL for (int i = 0; i < VL<A>; ++i) if ((i & H) == 0) {
    const Vec<A> a = r[i], b = r[i + H];
    r[i] = low_halves<A, H>(a, b);
    r[i + H] = high_halves<A, H>(a, b);
  }
  if constexpr (H > 1) swap_blocks<A, H / 2>(r);
}
template <class A> HC_INLINE void transpose(Vec<A>* r) { swap_blocks<A, VL<A> / 2>(r); }

}  // namespace HETCONV_NS
}  // namespace hetconv
