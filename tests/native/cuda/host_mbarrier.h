// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/cuda/mbarrier.h with the same meaning on the CPU, for tests.
#pragma once
#include "hopper_machine.h"
#include "host_ptx.h"
#include "tensor_map.h"

#define HETCONV_BULK
#define __grid_constant__

namespace hetconv::cuda {

inline host::Hopper& hopper() { return *host::block->hopper; }

inline void mbarrier_init(uint32_t address, int count) { hopper().mbarrier_init(address, count); }
inline void mbarrier_init_done() {}
inline void mbarrier_arrive(uint32_t address) {
  hopper().mbarrier_arrive(address, uint32_t(host::block->rank()));
}
inline void mbarrier_expect(uint32_t address, uint32_t bytes) {
  hopper().mbarrier_arrive(address, uint32_t(host::block->rank()), bytes);
}
inline void mbarrier_wait(uint32_t address, uint32_t parity, uint32_t first) {
  hopper().mbarrier_wait(address, parity, first);
}
inline void fence_async() { hopper().fence(); }

using TensorMap = CUtensorMap;

inline void tma_load(uint32_t address, const TensorMap* map, int channel, int col, int row,
                     int image, uint32_t barrier) {
  hopper().tma_load(address, map, {channel, col, row, image}, barrier);
}

// Launches ---------------------------------------------------------------------------------------

inline int capability() { return 90; }

using TensorMapEncoder = host::TensorMapEncoder;
inline TensorMapEncoder tensor_map_encoder() { return host::encode_tiled; }
inline bool bind_context() { return true; }
inline int driver_version() { return 13010; }

template <class P>
const char* launch_bulk(void (*kernel)(P), const P& p, int64_t blocks_x, int64_t blocks_y,
                        int threads, int64_t shared, void*) {
  host::grid_size = {unsigned(blocks_x), unsigned(blocks_y), 1};
  host::block_size = {unsigned(threads), 1, 1};
  for (unsigned y = 0; y < blocks_y; ++y)
    for (unsigned x = 0; x < blocks_x; ++x) {
      host::Block own(threads, shared, {x, y, 0});
      host::Hopper watch({&own}, 2);
      host::run({&own}, host::seed + x + 31 * y, [&] { kernel(p); });
      watch.finish();
    }
  return nullptr;
}

}  // namespace hetconv::cuda
