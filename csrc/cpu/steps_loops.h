// SPDX-License-Identifier: Apache-2.0
// The table of the loops of steps between layers. Plain data (see problem.h).
#pragma once
#include <cstdint>

namespace hetconv {

// What is done to every element. `low` and `high` bound a clamp, `low` is the slope of a leaky
// ReLU.
enum class Each : int { add = 0, sub = 1, mul = 2, relu = 3, clamp = 4, leaky_relu = 5 };

// A window of an image in channels_last: its pixels, and the distances of rows and pixels in
// elements.
struct Window {
  int h, w;
  int64_t row, pixel;
};

// Of float32, then of bfloat16.
struct StepLoops {
  void (*each[2])(Each what, const char* a, const char* b, char* y, int64_t from, int64_t to,
                  float low, float high);
  void (*pool[2])(const char* x, Window s, int C, char* y);
  void (*mean[2])(const char* x, Window s, int C, float taps, char* y);
  void (*cast[2])(const char* x, char* y, int64_t from, int64_t to);  // to that dtype
};

extern const StepLoops step_loops_generic;
#if defined(__x86_64__)
extern const StepLoops step_loops_avx2;
extern const StepLoops step_loops_avx512;
#endif

}  // namespace hetconv
