// SPDX-License-Identifier: Apache-2.0
// The copies of hopper_machine.h that count at a barrier.
#include <algorithm>
#include <cstring>
#include <utility>

#include "hopper_machine.h"
#include "tensor_map.h"

namespace hetconv::host {

void Hopper::copy(uint32_t address, const void* source, uint32_t bytes, uint32_t barrier,
                  uint32_t blocks) {
  if (mistake.name == "skip-bulk" && copies_++ == mistake.at) return;
  if (bytes % 16 || uintptr_t(source) % 16)
    fail("a bulk copy of %u bytes from %p, which is not aligned to 16", bytes, source);
  if (blocks >> watched_.size()) fail("the cluster has no such blocks: %u", blocks);
  // Addresses of this block; the others have the copy and its barrier as far from their begin.
  const uint32_t offset = block->offset(address, bytes, 16, "a bulk copy");
  for (Watched& w : watched_)
    if (blocks >> w.block->rank() & 1)
      start(
          {w.block, offset, static_cast<const char*>(source), bytes, barrier_offset(barrier), {}});
}

void Hopper::tma_load(uint32_t address, const void* map, const int (&corner)[4], uint32_t barrier) {
  int own[4];
  std::copy(corner, corner + 4, own);
  if (mistake.name == "skip-bulk" && copies_++ == mistake.at) return;
  if (mistake.name == "wrong-corner" && copies_++ == mistake.at) ++own[1];
  if (mistake.name == "wrong-place" && copies_++ == mistake.at) address += 16;
  std::vector<char> box = box_of(map, own);
  const uint32_t offset = block->offset(address, int64_t(box.size()), 128, "a box");
  const uint32_t bytes = uint32_t(box.size());
  start({block, offset, nullptr, bytes, barrier_offset(barrier), std::move(box)});
}

void Hopper::start(Bulk&& bulk) {
  phase(*bulk.to, bulk.barrier);
  each_cell(*bulk.to, bulk.offset, bulk.bytes, [&](Cell& cell, uint32_t place) {
    int other = 0;
    const char* wrong = order_.copied_by(cell, me(), other);
    say(wrong, *bulk.to, place, other);
  });
  bulks_.push_back(std::move(bulk));
}

void Hopper::land_bulk(size_t index) {
  std::swap(bulks_[index], bulks_.back());
  const Bulk bulk = std::move(bulks_.back());
  bulks_.pop_back();
  if (bulk.to->left() == 0) fail("a copy comes to block %d, which has ended", bulk.to->rank());
  std::memcpy(bulk.to->memory(bulk.offset), bulk.source ? bulk.source : bulk.made.data(),
              bulk.bytes);
  Phase& p = phase(*bulk.to, bulk.barrier);
  each_cell(*bulk.to, bulk.offset, bulk.bytes,
            [&](Cell& cell, uint32_t) { order_.landed(cell, p.engine, true); });
  p.bytes -= bulk.bytes;
  tell(p);
  settle(*bulk.to, bulk.barrier, p);
}

}  // namespace hetconv::host
