// SPDX-License-Identifier: Apache-2.0
#include "masking.h"

#include <stdexcept>
#include <string>

#include "engine.h"
#include "threads.h"

namespace hetconv {
namespace {

constexpr int64_t kPiece = 1 << 16;  // weights that are worth a thread

// Those of the instruction set that the engine takes.
const MaskLoops& loops() {
#if defined(__x86_64__)
  static const std::string best = available_isas().front()->name;
  if (best.rfind("avx512", 0) == 0) return mask_loops_avx512;
  if (best == "avx2") return mask_loops_avx2;
#endif
  return mask_loops_generic;
}

int by_size(int size) {
  if (size != 2 && size != 4 && size != 8)
    throw std::invalid_argument("weights of " + std::to_string(size) +
                                " bytes: expected 2, 4 or 8");
  return size == 2 ? 0 : size == 4 ? 1 : 2;
}

// Runs run(begin, end) over [0, count), each of which stands for `weights`.
template <class Run> void in_pieces(int64_t count, int64_t weights, int threads, const Run& run) {
  threads = usable_threads(threads);
  const int64_t fit = count * (weights < 1 ? 1 : weights) / kPiece;
  pieces_in_parallel(count, int(fit < 1 ? 1 : fit < threads ? fit : threads), run);
}

}  // namespace

void mask_weights(const void* w, const uint8_t* live, void* y, int64_t count, int size,
                  int threads) {
  const auto loop = loops().mask[by_size(size)];
  in_pieces(count, 1, threads, [&](int64_t from, int64_t to) {
    loop(static_cast<const char*>(w), live, static_cast<char*>(y), from, to);
  });
}

void transpose_weights(const void* w, const uint8_t* live, void* y, int64_t F, int64_t C,
                       int64_t taps, int size, int threads) {
  const auto loop = loops().transpose[by_size(size)];
  in_pieces(F, C * taps, threads, [&](int64_t from, int64_t to) {
    loop(static_cast<const char*>(w), live, static_cast<char*>(y), C, taps, from, to);
  });
}

void multiply_masked(const MaskedProduct& p, int threads) {
  const auto loop = loops().product;
  in_pieces(p.F, p.C, threads, [&](int64_t from, int64_t to) { loop(p, from, to); });
}

void sum_images(const MaskedImages& p, int threads) {
  if (p.taps < 1 || p.images < 1 || p.taps > kMostTaps)
    throw std::invalid_argument("images have 1 to " + std::to_string(kMostTaps) + " taps");
  const auto loop = loops().sum;
  in_pieces(p.F, p.C * p.images, threads, [&](int64_t from, int64_t to) { loop(p, from, to); });
}

}  // namespace hetconv
