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
  for (Watched& w : watched_) {
    if (!(blocks >> w.block->rank() & 1)) continue;
    w.block->check(address, bytes, 16, "a bulk copy");
    start({w.block, address, static_cast<const char*>(source), bytes, barrier, {}});
  }
}

void Hopper::copy_box(uint32_t address, const void* map, const int (&corner)[4], uint32_t barrier) {
  int own[4];
  std::copy(corner, corner + 4, own);
  if (mistake.name == "skip-bulk" && copies_++ == mistake.at) return;
  if (mistake.name == "wrong-corner" && copies_++ == mistake.at) ++own[1];
  if (mistake.name == "wrong-place" && copies_++ == mistake.at) address += 16;
  std::vector<char> box = box_of(map, own);
  block->check(address, int64_t(box.size()), 128, "a box");
  start({block, address, nullptr, uint32_t(box.size()), barrier, std::move(box)});
}

void Hopper::start(Bulk&& bulk) {
  phase(*bulk.to, bulk.barrier);
  each_cell(*bulk.to, bulk.address, bulk.bytes, [&](Cell& cell, uint32_t place) {
    int other = 0;
    const char* wrong = order_.copied_by(cell, me(), other);
    say(wrong, *bulk.to, place, other);
  });
  bulks_.push_back(std::move(bulk));
}

bool Hopper::land_one() {
  if (bulks_.empty()) return false;
  size_t drawn = draw(unsigned(bulks_.size()));
  for (int again = 0; again < 8 && !favours(*bulks_[drawn].to); ++again)
    drawn = draw(unsigned(bulks_.size()));
  std::swap(bulks_[drawn], bulks_.back());
  const Bulk bulk = std::move(bulks_.back());
  bulks_.pop_back();
  if (bulk.to->left() == 0) fail("a copy comes to block %d, which has ended", bulk.to->rank());
  std::memcpy(bulk.to->memory(bulk.address), bulk.source ? bulk.source : bulk.made.data(),
              bulk.bytes);
  Phase& p = phase(*bulk.to, bulk.barrier);
  each_cell(*bulk.to, bulk.address, bulk.bytes,
            [&](Cell& cell, uint32_t) { order_.landed(cell, p.engine); });
  const uint32_t now = order_.of(p.engine)[size_t(p.engine)];
  p.arrived[size_t(p.engine)] = now;
  order_.tick(p.engine);
  p.bytes -= bulk.bytes;
  settle(*bulk.to, bulk.barrier, p);
  return true;
}

}  // namespace hetconv::host
