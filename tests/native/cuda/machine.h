// SPDX-License-Identifier: Apache-2.0
// A block of CUDA threads on the CPU: one fiber a thread, shared memory that is watched.
//
// Every access of shared memory is checked: inside the block's memory, aligned, written before it
// is read, not while an asynchronous copy is on its way there, and ordered by a barrier against
// other threads' writes (and a write against their reads). Warp-wide instructions wait until all 32
// lanes have come to the same one. Blocks of a cluster run together, a lone block is a cluster of
// one; which thread goes on where several can is drawn by lot. What only Hopper has is in
// hopper_machine.h and watched by order.h instead.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace hetconv::host {

struct Dim {
  unsigned x, y, z;
};

// Ends the process with a sentence.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A mistake that the shim makes on purpose, so that a test sees it found.
struct Mistake {
  std::string
      name;        // skip-barrier, skip-wait, skip-copy, wrong-address, or one of hopper_machine.h
  int64_t at = 0;  // which of the calls (of every thread, for barriers and waits)
};
extern Mistake mistake;

// Where a block's shared memory begins, as on sm_90: after a reserved KiB, and in a cluster with
// the block's rank from bit 24 on.
constexpr uint32_t kReserved = 1024;
constexpr int kRankBit = 24;

struct Copy {
  uint32_t offset;
  const void* source;  // null: zeros
  int group;
};

enum class Waiting { nothing, barrier, warp, warpgroup, phase, named, cluster, copies };

struct Fiber {
  Dim thread{};
  Waiting waiting = Waiting::nothing;
  bool done = false, started = false;
  int64_t barriers = 0, waits = 0, mbarriers = 0, fences = 0, products = 0;
  uint32_t place = 0;  // the barrier that it waits at
  int groups = 0;      // committed
  int awaited = 0;     // copies that barriers wait for, sets of them
  std::vector<Copy> copies;
  std::unique_ptr<char[]> stack;
  void* context = nullptr;
};

// What a lane hands to a warp-wide instruction, and what it gets back.
struct LaneArguments {
  uint32_t address = 0;
  uint32_t a[4] = {}, b[2] = {};
  float c[4] = {};
  uint32_t result[4] = {};
};

struct Warp {
  const char* instruction = nullptr;
  int arrived = 0;
  LaneArguments lanes[32];
};

class Hopper;

class Block {
 public:
  Block(int threads, int64_t shared, Dim index, int rank = 0);
  ~Block();

  Fiber& current() { return fibers_[now_]; }
  Fiber& fiber(int thread) { return fibers_[thread]; }
  int threads() const { return int(fibers_.size()); }
  int left() const { return left_; }
  int rank() const { return rank_; }
  uint32_t begin() const { return uint32_t(rank_) << kRankBit | kReserved; }
  char* memory(uint32_t offset) { return memory_.data() + offset; }
  int64_t size() const { return int64_t(memory_.size()); }

  void barrier();
  // Comes together with the other lanes; the last one calls `all` for the warp.
  LaneArguments& together(const char* instruction, const LaneArguments& own,
                          void (*all)(Block&, Warp&));

  void read(uint32_t address, void* to, int bytes);
  // As lane `lane` of the current warp: what a warp-wide load reads.
  void read_as(int thread, uint32_t address, void* to, int bytes);
  void write(uint32_t address, const void* from, int bytes);
  void write_as(int thread, uint32_t address, const void* from, int bytes);
  void copy(uint32_t address, const void* source);
  void commit();
  void wait(int pending);
  void put(const Copy& copy);  // to memory

  // Returns how far from the begin an address is; all bytes from there on must be this block's.
  uint32_t offset(uint32_t address, int64_t bytes, int alignment, const char* what) const;
  void yield(Waiting why);
  void wake(int thread);

  const Dim index;
  Hopper* hopper = nullptr;  // that watches instead

 private:
  struct Granule {  // two bytes
    int32_t writer = -1, reader = -1;
    int64_t written = -1, read = -1;  // in which epoch
    int32_t coming = 0;               // copies on their way
    bool many = false;                // several threads read it in that epoch
  };

  void note_write(int thread, uint32_t offset, int bytes);
  void resume(int next);
  void land(Fiber& fiber, const Copy& copy);

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<char> memory_;
  std::vector<Granule> granules_;
  int now_ = 0, left_ = 0, at_barrier_ = 0, rank_;
  int64_t epoch_ = 0, copies_ = 0;
  friend struct Start;
  friend struct Turns;
};

// Runs blocks together until all their threads have ended.
void run(const std::vector<Block*>& blocks, unsigned seed, const std::function<void()>& kernel);

// A number below `count`, drawn by lot.
unsigned draw(unsigned count);

// Whether a block of a cluster is to run ahead; by some seeds one is.
bool favours(const Block& b);

extern Block* block;  // that is running
extern Dim block_index, grid_size, block_size;
extern unsigned seed;  // of the lots

}  // namespace hetconv::host
