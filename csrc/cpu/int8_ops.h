// SPDX-License-Identifier: Apache-2.0
// What a network in 8 bits has between its convolutions. Loops that the compiler vectorises.
#pragma once
#include "int8_pool.h"
#include "threads.h"

namespace hetconv {
namespace HETCONV_NS {

constexpr int64_t kInt8Piece = 1 << 14;  // elements that are worth a thread

// Runs run(begin, end) over [0, count) in pieces of at least `piece`.
template <class Run>
static void in_pieces(int64_t count, int64_t piece, int threads, const Run& run) {
  const int64_t pieces = most<int64_t>(1, least<int64_t>(threads, count / piece));
  pieces_in_parallel(count, int(pieces), run);
}

HC_INLINE float scaled(uint8_t q, uint8_t flip, int zero, float multiplier) {
  return float(int(q ^ flip) - zero) * multiplier;
}

// Rounds to nearest, ties to even, |t| < 2**22: adding 1.5 * 2**23 leaves no bits behind the point.
HC_INLINE int nearest_even(float t) {
  const float shifted = t + 12582912.0f;
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}
HC_INLINE uint8_t quick_byte_of(const Finish& f, float t) {
  const int q = nearest_even(clamped(t, -f.bound, f.bound)) + f.zero;
  const int in = q < f.least_byte ? f.least_byte : q > f.greatest_byte ? f.greatest_byte : q;
  return uint8_t(in) ^ f.flip;
}

template <bool two, bool whole>
static void int8_sum_piece(const Int8Sum& s, int64_t i, int64_t end) {
  const Finish f = finish_for(s.y_type, s.y_zero, s.low, s.high);
  const uint8_t flip_a = flip_of(s.a_type), flip_b = flip_of(s.b_type);
  const int zero_a = unsigned_zero(s.a_type, s.a_zero), zero_b = unsigned_zero(s.b_type, s.b_zero);
  const float ma = s.a_multiplier, mb = s.b_multiplier;
  const uint8_t *a = s.a, *b = s.b;
  uint8_t* bytes = static_cast<uint8_t*>(s.y);
  float* floats = static_cast<float*>(s.y);
  for (; i < end; ++i) {
    float t = scaled(a[i], flip_a, zero_a, ma);
    if (two) t = t + scaled(b[i], flip_b, zero_b, mb);
    if (whole)
      floats[i] = clamped(t, f.low, f.high);
    else
      bytes[i] = quick_byte_of(f, t);
  }
}

static void int8_sum(const Int8Sum& s) {
  in_pieces(s.count, kInt8Piece, s.threads, [&](int64_t i, int64_t end) {
    if (s.y_type == Int8Out::f32)
      s.b ? int8_sum_piece<true, true>(s, i, end) : int8_sum_piece<false, true>(s, i, end);
    else
      s.b ? int8_sum_piece<true, false>(s, i, end) : int8_sum_piece<false, false>(s, i, end);
  });
}

static void int8_mean(const Int8Images& s) {
  constexpr int kChannels = 64;  // at once
  const Finish f = finish_for(s.y_type, s.y_zero, s.low, s.high);
  const uint8_t flip = flip_of(s.x_type);
  const int64_t pixels = int64_t(s.H) * s.W;
  const int32_t zeros = int32_t(pixels * unsigned_zero(s.x_type, s.x_zero));
  const int64_t pieces = ceil_div(s.C, kChannels);
  in_pieces(s.N * pieces, most<int64_t>(1, kInt8Piece / (pixels * kChannels)), s.threads,
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) {
                const int64_t n = i / pieces;
                const int c0 = int(i % pieces) * kChannels, m = least(kChannels, s.C - c0);
                const uint8_t* x = s.x + n * pixels * s.C + c0;
                int32_t sums[kChannels] = {0};
                for (int64_t k = 0; k < pixels; ++k, x += s.C)
                  for (int c = 0; c < m; ++c) sums[c] += x[c] ^ flip;
                for (int c = 0; c < m; ++c) {
                  const float t = float(sums[c] - zeros) * s.multiplier;
                  const int64_t at = n * s.C + c0 + c;
                  if (s.y_type == Int8Out::f32)
                    static_cast<float*>(s.y)[at] = clamped(t, f.low, f.high);
                  else
                    static_cast<uint8_t*>(s.y)[at] = byte_of(f, t);
                }
              }
            });
}

static void int8_max_pool(const Int8Images& s) {
  const Pool& q = *s.pool;
  const int64_t row = int64_t(q.Wo) * s.C * q.KH * q.KW;
  in_pieces(s.N * q.Ho, most<int64_t>(1, kInt8Piece / most<int64_t>(row, 1)), s.threads,
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) {
                const int64_t n = i / q.Ho;
                const int py = int(i % q.Ho);
                pool_bytes(q, s.x + n * s.H * s.W * s.C, 0, s.H, s.W, s.C, s.x_type == Byte::s8,
                           static_cast<uint8_t*>(s.y) + n * q.Ho * q.Wo * s.C, py, py + 1);
              }
            });
}

// A NaN becomes the zero point, which stands for 0. On its own and by value, so that the bytes it
// writes cannot be what it reads: then it is vectorised.
static void int8_quantize_piece(const float* x, int64_t count, float scale, Finish f,
                                uint8_t* __restrict y) {
  for (int64_t i = 0; i < count; ++i) {
    const float t = x[i] / scale;
    y[i] = quick_byte_of(f, t == t ? t : 0.0f);
  }
}

static void int8_quantize(const float* x, int64_t count, float scale, int zero, Byte type,
                          uint8_t* y, int threads) {
  const bool s8 = type == Byte::s8;
  const Finish f =
      finish_for(s8 ? Int8Out::s8 : Int8Out::u8, zero, s8 ? -128.0f : 0.0f, s8 ? 127.0f : 255.0f);
  in_pieces(count, kInt8Piece, threads,
            [&](int64_t i, int64_t end) { int8_quantize_piece(x + i, end - i, scale, f, y + i); });
}

}  // namespace HETCONV_NS

// ...: `signed_bytes` and `pixels` where they are not false.
#define HETCONV_INT8_KERNELS(name, shuffle_cost, row_cost, ...)                    \
  Int8Kernels {                                                                    \
    #name, HETCONV_NS::kInt8Units, shuffle_cost, row_cost, HETCONV_NS::int8_fprop, \
        HETCONV_NS::int8_sum, HETCONV_NS::int8_mean, HETCONV_NS::int8_max_pool,    \
        HETCONV_NS::int8_quantize, ##__VA_ARGS__                                   \
  }

}  // namespace hetconv
