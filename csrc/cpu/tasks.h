// SPDX-License-Identifier: Apache-2.0
// Tasks 0, 1, ... shared among threads. Each thread has a range of its own, so that neighbours in
// the image follow one another in one core's cache; a thread that has finished takes from others.
#pragma once
#include <atomic>
#include "threads.h"
#include "vec.h"

namespace hetconv {
namespace HETCONV_NS {

class Tasks {
 public:
  Tasks(int64_t count, int threads) : ranges_(int(least<int64_t>(threads, kMostRanges))) {
    for (int i = 0; i < ranges_; ++i) {
      range_[i].next.store(count * i / ranges_, std::memory_order_relaxed);
      range_[i].end = count * (i + 1) / ranges_;
    }
  }
  // The next task of a thread, or -1: nothing is left.
  int64_t take(int thread) {
    for (int i = 0; i < ranges_; ++i) {
      Range& r = range_[(thread + i) % ranges_];
      if (r.next.load(std::memory_order_relaxed) >= r.end) continue;
      const int64_t task = r.next.fetch_add(1, std::memory_order_relaxed);
      if (task < r.end) return task;
    }
    return -1;
  }
  // What `take` will probably answer next, or -1: worth a prefetch, not more.
  int64_t expected(int thread) const {
    const Range& r = range_[thread % ranges_];
    const int64_t task = r.next.load(std::memory_order_relaxed);
    return task < r.end ? task : -1;
  }

 private:
  static constexpr int kMostRanges = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  int ranges_;
  Range range_[kMostRanges];
};

}  // namespace HETCONV_NS
}  // namespace hetconv
