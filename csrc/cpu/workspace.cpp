// SPDX-License-Identifier: Apache-2.0
// The memory that each thread works in. A file of its own, because the tests of the engine put
// another in its place, which notices every byte beside what was asked for.
#include <cstdlib>
#include <new>

#include "problem.h"

namespace hetconv {

namespace {
struct Room {
  void* data = nullptr;
  size_t bytes = 0;
  ~Room() { std::free(data); }
};
thread_local Room room;
}  // namespace

void out_of_memory() { throw std::bad_alloc(); }

void* workspace(size_t bytes) {
  if (room.bytes < bytes) {
    std::free(room.data);
    room.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    room.data = std::aligned_alloc(64, rounded);
    if (!room.data) out_of_memory();
    room.bytes = rounded;
  }
  return room.data;
}

}  // namespace hetconv
