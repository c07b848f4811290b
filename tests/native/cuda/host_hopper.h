// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/cuda/hopper.h with the same meaning on the CPU, for tests.
#pragma once
#include <memory>

#include "host_mbarrier.h"

#define HETCONV_WGMMA

namespace hetconv::cuda {

inline int warp_index() { return int(threadIdx.x) / 32; }

template <int kCount> void fewer_registers() {}
template <int kCount> void more_registers() {}

inline int64_t clocks() { return 0; }

inline void barrier_of(int name, int threads) { hopper().named_barrier(name, threads); }
inline void warp_barrier() { hopper().warp_barrier(); }
inline uint32_t cluster_rank() { return uint32_t(host::block->rank()); }
inline void cluster_barrier() { hopper().cluster_barrier(); }

inline void mbarrier_arrive_at(uint32_t address, uint32_t rank) {
  hopper().mbarrier_arrive(address, rank);
}

inline void copy_bulk(uint32_t address, const void* source, uint32_t bytes, uint32_t barrier) {
  hopper().copy(address, source, bytes, barrier, 1u << host::block->rank());
}
inline void copy_bulk_to(uint32_t address, const void* source, uint32_t bytes, uint32_t barrier,
                         uint32_t blocks) {
  hopper().copy(address, source, bytes, barrier, blocks);
}
inline void copy_arrive(uint32_t address) { hopper().arrive_copied(address); }

inline void store_matrices_transposed(uint32_t address, const Quad& q) {
  host::LaneArguments own;
  own.address = address;
  std::memcpy(own.a, q.v, sizeof own.a);
  host::block->together("store_matrices_transposed", own, [](host::Block& block, host::Warp& warp) {
    const int first = int(block.current().thread.x) / 32 * 32;
    for (int lane = 0; lane < 32; ++lane) {
      // Row lane % 8 of matrix lane / 8 is a column of its fragment: two numbers of each lane.
      const int m = lane / 8, column = lane % 8;
      uint16_t row[8];
      for (int i = 0; i < 8; ++i)
        row[i] = uint16_t(warp.lanes[i * 4 + column / 2].a[m] >> column % 2 * 16);
      block.write_as(first + lane, warp.lanes[lane].address, row, 16);
    }
  });
}

inline void products_begin() { hopper().products_begin(); }
inline void products_commit() { hopper().products_commit(); }
template <int kPending> void products_wait() { hopper().products_wait(kPending); }
template <int kCount> void hold_registers(float (&)[kCount]) {}

template <class T, int kColumns> void product(float (&d)[kColumns / 2], uint64_t a, uint64_t b) {
  hopper().product(d, {kColumns, a, b, widen<T>});
}
template <class T, int kColumns>
void product_of_registers(float (&d)[kColumns / 2], const Quad& a, uint64_t b) {
  hopper().product(d, {kColumns, 0, b, widen<T>, true}, a.v);
}

// Launches ---------------------------------------------------------------------------------------

template <class P> int64_t max_resident_clustered(void (*)(P), int, int64_t, int cluster) {
  return 2 * cluster;
}

template <class P>
const char* launch_clustered(void (*kernel)(P), P p, int64_t blocks, int threads, int64_t shared,
                             int cluster, void*) {
  host::grid_size = {unsigned(blocks), 1, 1};
  host::block_size = {unsigned(threads), 1, 1};
  for (unsigned first = 0; first < blocks; first += unsigned(cluster)) {
    std::vector<std::unique_ptr<host::Block>> own;
    std::vector<host::Block*> together;
    for (int rank = 0; rank < cluster; ++rank) {
      const host::Dim index{first + unsigned(rank), 0, 0};
      own.push_back(std::make_unique<host::Block>(threads, shared, index, rank));
      together.push_back(own.back().get());
    }
    host::Hopper watch(together);
    host::run(together, host::seed + first, [&] { kernel(p); });
    watch.finish();
  }
  return nullptr;
}

}  // namespace hetconv::cuda
