// SPDX-License-Identifier: Apache-2.0
// The workspace of the tests: exactly as large as asked, filled with NaN, new at every call, so
// that the address sanitizer sees each byte beyond it and nothing old can be read as if it were
// new.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../../csrc/cpu/problem.h"
#include "driver.h"

namespace {
struct Room {
  void* data = nullptr;
  ~Room() { std::free(data); }
};
thread_local Room room;
std::atomic<size_t> largest(0);
}  // namespace

namespace driver {
size_t largest_workspace() { return largest.exchange(0); }
}  // namespace driver

namespace hetconv {

void out_of_memory() { throw std::bad_alloc(); }

void* workspace(size_t bytes) {
  size_t seen = largest.load();
  while (seen < bytes && !largest.compare_exchange_weak(seen, bytes)) continue;
  std::free(room.data);
  room.data = nullptr;
  if (posix_memalign(&room.data, 64, bytes)) out_of_memory();
  std::memset(room.data, 0xff, bytes);
  return room.data;
}

}  // namespace hetconv
