// SPDX-License-Identifier: Apache-2.0
// Weights that may have changed since the last call: brought into the form of a call, by their
// mask. A layer that is trained keeps nothing of its weight, so that this is done each time.
#pragma once
#include <cstdint>

namespace hetconv {

// Rows times a masked matrix, float32, all contiguous, at any address but y's: y = x · (w ∘ mask)ᵀ
// + bias.
struct MaskedProduct {
  const void* w;        // [F][C]
  const uint8_t* bits;  // [F][ceil(C / 8)], lowest first
  const void* x;        // [rows][C]
  const void* bias;     // [F], or null
  float* y;             // [rows][F]
  int64_t rows, F, C;
};

// Sums of images, float32: y[f][c] = the sum over u of image[u] · w[f][c][u], where that is live.
struct MaskedImages {
  const void* w;        // [F][C][images], at any address
  const uint8_t* live;  // [F][images][C]
  const float* image;   // [images][taps]
  float* y;             // [F][C][taps], or [F][taps][C] where it is transposed
  int64_t F, C, images, taps;
  bool transposed;
};
constexpr int64_t kMostTaps = 1024;

// By the size of an element: 2, 4 and 8 bytes.
struct MaskLoops {
  void (*mask[3])(const char* w, const uint8_t* live, char* y, int64_t from, int64_t to);
  void (*transpose[3])(const char* w, const uint8_t* live, char* y, int64_t C, int64_t taps,
                       int64_t from, int64_t to);
  void (*product)(const MaskedProduct& p, int64_t from, int64_t to);  // filters
  void (*sum)(const MaskedImages& p, int64_t from, int64_t to);       // filters
};

extern const MaskLoops mask_loops_generic;
#if defined(__x86_64__)
extern const MaskLoops mask_loops_avx2;
extern const MaskLoops mask_loops_avx512;
#endif

// y = w where `live` is not 0, else 0, `count` elements of `size` bytes in one order. y may be w.
// Throws std::invalid_argument for another size than 2, 4 or 8.
void mask_weights(const void* w, const uint8_t* live, void* y, int64_t count, int size,
                  int threads);
// The same of F filters [C][taps], written as [taps][C], which is the order of `live` too.
void transpose_weights(const void* w, const uint8_t* live, void* y, int64_t F, int64_t C,
                       int64_t taps, int size, int threads);
void multiply_masked(const MaskedProduct& p, int threads);
// Throws std::invalid_argument for images of more than kMostTaps.
void sum_images(const MaskedImages& p, int threads);

}  // namespace hetconv
