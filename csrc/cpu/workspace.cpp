// SPDX-License-Identifier: Apache-2.0
// The memory that each thread works in. A file of its own, because the tests of the engine put
// another in its place, which notices every byte beside what was asked for.
#include <cstdlib>
#include <new>

#include "memory.h"
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
    room.data = nullptr;
    room.bytes = 0;
    // Of more than a few pages a huge one is made, where the system gives it.
    const size_t unit = bytes < kHugePage / 4 ? 4096 : kHugePage;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    room.data = allocate(rounded);
    room.bytes = rounded;
  }
  return room.data;
}

}  // namespace hetconv
