// SPDX-License-Identifier: Apache-2.0
// What a Hopper GPU has beside: barriers of phases, bulk copies, matrix products of a warpgroup
// with operands in shared memory, and clusters of blocks.
//
// Copies land when somebody waits for them and nobody else can go on, or by lot; also a thread's
// own that a barrier waits for. Products are
// computed when their group is waited for: until then their accumulators are NaN, and an operand
// that is overwritten too early spoils them. Which accesses are ordered is watched by order.h.
// Mistakes that can be made on purpose, `at` counting the calls of every thread: skip-phase (a wait
// for a phase), skip-arrive, skip-fence, skip-products-wait, skip-named, skip-warp,
// skip-cluster, wrong-operand; skip-bulk, and of boxes wrong-corner and wrong-place, which count
// copies; and wrong-bytes, which counts what threads say that they expect.
#pragma once
#include <map>

#include "machine.h"
#include "order.h"

namespace hetconv::host {

// d += a * b of a warpgroup; see product() in csrc/cuda/hopper.h.
struct Product {
  int columns;
  uint64_t a, b;
  float (*widen)(uint32_t);
  bool registers = false;  // a lies there, and b is transposed
};

class Hopper {
 public:
  // Accesses of shared memory are multiples of `grain` bytes.
  explicit Hopper(const std::vector<Block*>& blocks, int grain = 16);

  // Shared memory; offsets from the block's begin.
  void read(Block& at, int thread, uint32_t offset, int bytes);
  void write(Block& at, int thread, uint32_t offset, int bytes);
  void coming(Block& at, uint32_t offset, bool is);  // 16 bytes

  void mbarrier_init(uint32_t address, int count);
  void mbarrier_arrive(uint32_t address, uint32_t rank, uint32_t expected = 0);
  void mbarrier_wait(uint32_t address, uint32_t parity, uint32_t first);

  // To each block of the cluster whose bit is set.
  void copy(uint32_t address, const void* source, uint32_t bytes, uint32_t barrier,
            uint32_t blocks);
  // A box of a tensor, to the block itself.
  void tma_load(uint32_t address, const void* map, const int (&corner)[4], uint32_t barrier);
  // Has the barrier count an arrival once all copies of this thread have ended.
  void arrive_copied(uint32_t address);
  // Waits for copies of this thread that were committed before that many groups were.
  void copies_wait(int before);
  void fence();

  void named_barrier(int name, int threads);
  void warp_barrier();
  void cluster_barrier();
  void all_know(Block& at);  // what any of its threads knows

  void products_begin();
  void product(float* d, const Product& own, const uint32_t* a = nullptr);
  void products_commit();
  void products_wait(int pending);

  bool land_one();
  void ends();          // the current thread
  void finish() const;  // all threads have
  std::string state(const Block& at, uint32_t offset) const;

 private:
  struct Waiter {
    int thread;
    uint32_t parity;
  };
  struct Phase {
    int count = 0, pending = 0, engine = 0;
    int64_t bytes = 0, ended = 0;
    Clock arrived, known;
    std::vector<Waiter> waiters;
  };
  struct Bulk {
    Block* to;
    uint32_t offset;
    const char* source;
    uint32_t bytes, barrier;  // which is an offset too
    std::vector<char> made;   // where `source` is no memory of the device
  };
  struct Awaited {
    Block* at;
    int thread;
    uint32_t barrier;
    bool landed;
    std::vector<Copy> copies;
  };
  struct Named {
    std::vector<int> threads;
  };
  struct Lane {
    bool begun = false;
    int groups = 0;
    float* d = nullptr;
    uint32_t a[4] = {};
    Product own{};
    int pending = 0;
    // The accumulators, while products are on their way.
    std::map<float*, std::vector<float>> kept;
  };
  struct Operands {  // of a lane
    float* d;
    uint32_t a[4];
  };
  struct Pending {
    Product product;
    int group;
    std::vector<Operands> lanes;
  };
  struct Warpgroup {
    const char* instruction = nullptr;
    int arrived = 0, checked = 0;
    Lane lanes[128];
    std::vector<Pending> pending;
    std::vector<uint32_t> times;  // of the groups, on the engine's clock
  };
  struct Watched {
    Block* block;
    std::vector<Cell> cells;
    std::map<uint32_t, Phase> mbarriers;
    std::map<int, Named> named;
    std::vector<Warpgroup> warpgroups;
  };

  int me() const;
  int member(const Block& at, int thread) const { return at.rank() * threads_ + thread; }
  int engine_of(const Block& at, int warpgroup) const;
  std::string name(int who) const;
  void access(Block& at, int thread, uint32_t offset, int bytes, const char* verb,
              const char* (Order::*check)(Cell&, int, int&));
  void say(const char* wrong, const Block& at, uint32_t offset, int other) const;
  Cell& cell(const Block& at, uint32_t offset) {
    return watched_[size_t(at.rank())].cells[offset / uint32_t(grain_)];
  }
  // Calls for each cell of a range, with its offset.
  template <class Do> void each_cell(const Block& at, uint32_t offset, uint32_t bytes, Do act) {
    for (uint32_t i = 0; i < bytes; i += uint32_t(grain_)) act(cell(at, offset + i), offset + i);
  }
  void start(Bulk&& bulk);
  static uint32_t barrier_offset(uint32_t address) {
    return block->offset(address, 8, 8, "a barrier");
  }
  Phase& phase(const Block& at, uint32_t offset);
  void settle(Block& at, uint32_t offset, Phase& p);
  void tell(Phase& p);
  void land_bulk(size_t index);
  void land_copies(size_t index);
  bool has_ended(const Phase& p, uint32_t parity) const {
    return (uint64_t(p.ended) & 1) != parity;
  }
  void meet(int name, int threads);
  Warpgroup& group();
  bool together(Warpgroup& group, const char* instruction);
  void release(Warpgroup& group);
  void read_operand(const Product& p, bool b, int starter);
  void multiply(Warpgroup& group, const Pending& p);

  int threads_, groups_, engines_, grain_, phases_ = 0, at_cluster_ = 0;
  int64_t copies_ = 0, expected_ = 0;
  std::vector<Watched> watched_;
  std::vector<Bulk> bulks_;
  std::vector<Awaited> awaited_;
  Order order_;
};

}  // namespace hetconv::host
