// SPDX-License-Identifier: Apache-2.0
// What the files of several steps have in common: see saved_steps.cpp.
#pragma once
#include "saved.h"
#include "steps.h"

namespace hetconv {

constexpr int kMostPixels = 1 << 30;  // along an axis, padding included
constexpr int64_t kMostStride = int64_t(1) << 40;
constexpr int64_t kMostElements = int64_t(1) << 40;
constexpr int64_t kMostImages = int64_t(1) << 40;

int size_of(DType dtype);

void put_pool(Writer& to, const Pool* pool);
// False: there is none. Every window has a pixel of H x W in it.
bool read_pool(Reader& from, Pool* pool, int H, int W);

float read_finite(Reader& from, const char* what);
int read_zero(Reader& from, Byte type);

// What results in 8 bits and float32 of them share.
struct Ends {
  Int8Out type;
  int zero;
  float low, high;
};
void put_ends(Writer& to, const Ends& e);
Ends read_ends(Reader& from);
int bytes_of(Int8Out type);

// Of elements that lie side by side. Throws FileError where that is beyond all memory.
Reach dense_reach(std::initializer_list<int64_t> sizes, int element);

}  // namespace hetconv
