// SPDX-License-Identifier: Apache-2.0
// Which accesses of shared memory are ordered, by vector clocks: what a thread knows of every other
// one, handed on by barriers. An access that is not ordered against a write is a race, whatever
// order the threads happened to run in.
//
// Beside threads there are engines: the matrix products of a warpgroup, and the copies that count
// at a barrier. What a thread or an asynchronous copy of its own writes, products and bulk copies
// see once a thread that knew of the write has fenced, the writer or a later one, and the thread
// that starts them knows of that fence.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hetconv::host {

// What one knows of every member: the time up to which, then the time up to which it is fenced.
using Clock = std::vector<uint32_t>;

// A piece of shared memory, the unit that is watched: two bytes or sixteen.
struct Cell {
  int32_t writer = -1;
  uint32_t written = 0;
  bool engine = false;  // it was written as engines do, past the threads' own view
  bool coming = false;  // a copy is on its way
  bool closed = false;  // a barrier lies there
  struct Reader {
    int32_t who;
    uint32_t when;
  };
  std::vector<Reader> readers;  // since it was written
};

class Order {
 public:
  explicit Order(int members);

  Clock& of(int who) { return clocks_[std::size_t(who)]; }
  // Ends a member's present: what it does from now on is later than what others learn now.
  void tick(int who) { ++clocks_[std::size_t(who)][size_t(who)]; }
  void fence(int who);
  static void join(Clock& to, const Clock& from);

  // Whether `who` knows of what `other` did at that time.
  bool knows(int who, int other, uint32_t when) const;
  // Whether what was written then is fenced, as far as `who` knows.
  bool fenced(int who, int writer, uint32_t when) const;

  // Each returns null, or what is wrong; `other` is then who it is about.
  const char* read(Cell& cell, int who, int& other);
  const char* write(Cell& cell, int who, int& other);
  // The same by an engine, for a thread that starts it.
  const char* read_by(Cell& cell, int engine, int starter, int& other);
  const char* copied_by(Cell& cell, int starter, int& other);
  // What a copy brought; a thread's own asynchronous copies write as threads do.
  void landed(Cell& cell, int engine, bool bulk);

 private:
  void remember(Cell& cell, int who);
  std::vector<Clock> clocks_;
};

}  // namespace hetconv::host
