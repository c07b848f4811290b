// SPDX-License-Identifier: Apache-2.0
// From which size on outputs are written past the caches: see non_temporal.h.
#include <atomic>
#include <cstdio>

#include "problem.h"

namespace hetconv {

namespace {
// Of this processor, by Linux: the C library counts those of all sockets.
int64_t last_level_cache() {
  long kib = 0;
  if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  return int64_t(kib > 0 ? kib : 32 << 10) << 10;
}
std::atomic<int64_t>& bytes() {
  static std::atomic<int64_t> held(last_level_cache());
  return held;
}
}  // namespace

int64_t non_temporal_bytes() { return bytes().load(std::memory_order_relaxed); }
void set_non_temporal_bytes(int64_t more_than) {
  bytes().store(more_than, std::memory_order_relaxed);
}

}  // namespace hetconv
