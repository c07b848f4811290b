// SPDX-License-Identifier: Apache-2.0
// How steps between layers share their work out to threads.
#pragma once
#include "engine.h"
#include "threads.h"

namespace hetconv {
namespace {

constexpr int64_t kPiece = 1 << 15;  // elements that are worth a thread

// Runs run(begin, end) over [0, count) in pieces of at least `piece`.
template <class Run> void in_pieces(int64_t count, int64_t piece, int threads, const Run& run) {
  threads = usable_threads(threads);
  const int64_t fit = count / (piece < 1 ? 1 : piece);
  const int64_t pieces = fit < 1 ? 1 : fit < threads ? fit : threads;
  pieces_in_parallel(count, int(pieces), run);
}

// A call says how many threads it takes, or leaves it to the step.
inline int asked(int threads, int own) { return threads > 0 ? threads : own; }

}  // namespace
}  // namespace hetconv
