// SPDX-License-Identifier: Apache-2.0
// The threads of the one OpenMP runtime that is in the process already, torch's. By its function
// rather than by pragmas: GOMP_parallel is in GCC's runtime, in LLVM's and in Intel's, so that a
// binary of any compiler runs on whichever it is, and brings none of its own.
#pragma once
#include <atomic>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
int omp_get_max_threads();
}

namespace hetconv {
#ifdef HETCONV_NS  // of one instruction set, as all that is compiled for it
namespace HETCONV_NS {
#else
namespace {
#endif

// Runs body(thread) once on each of at most `threads` threads, numbered from 0. The runtime may
// give fewer: one where the caller is itself one of a team.
template <class Body> static void in_parallel(int64_t threads, const Body& body) {
  if (threads <= 1) return body(0);
  GOMP_parallel([](void* data) { (*static_cast<const Body*>(data))(omp_get_thread_num()); },
                const_cast<Body*>(&body), unsigned(threads), 0);
}

// Runs body(i) for 0 <= i < count, each by the next thread that is free.
template <class Body> static void each_in_parallel(int64_t count, int threads, const Body& body) {
  std::atomic<int64_t> next(0);
  in_parallel(threads < count ? threads : count, [&](int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

// Runs body(begin, end) over [0, count), a piece for each thread.
template <class Body> static void pieces_in_parallel(int64_t count, int threads, const Body& body) {
  in_parallel(threads < count ? threads : count, [&](int thread) {
    const int64_t all = threads > 1 && count > 1 ? omp_get_num_threads() : 1;
    body(count * thread / all, count * (thread + 1) / all);
  });
}

}  // namespace
}  // namespace hetconv
