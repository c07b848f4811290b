// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup, computed when they are waited for.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "hopper_machine.h"

namespace hetconv::host {

namespace {

int64_t field(uint64_t operand, int bit) { return int64_t(operand >> bit & 0x3FFF) * 16; }

// Where row and half of a k of 16 lie from the block's begin, as the descriptor says: its fields
// have no room for a rank.
int64_t row_offset(uint64_t operand, int row, int half) {
  return field(operand, 0) + row / 8 * field(operand, 32) + row % 8 * 16 +
         half * field(operand, 16) - kReserved;
}

// The same of sixteen bytes with eight columns of one k, where the operand is transposed.
int64_t column_offset(uint64_t operand, int eight, int k) {
  return field(operand, 0) + eight * field(operand, 32) + k / 8 * field(operand, 16) + k % 8 * 16 -
         kReserved;
}

}  // namespace

Hopper::Warpgroup& Hopper::group() {
  return watched_[size_t(block->rank())].warpgroups[block->current().thread.x / 128];
}

// Whether this lane is the last of its warpgroup to come to an instruction.
bool Hopper::together(Warpgroup& group, const char* instruction) {
  if (group.arrived && std::strcmp(group.instruction, instruction))
    fail("its warpgroup is divided: %s here, %s elsewhere", instruction, group.instruction);
  group.instruction = instruction;
  if (++group.arrived == 128) {
    group.arrived = 0;
    return true;
  }
  block->yield(Waiting::warpgroup);
  return false;
}

void Hopper::release(Warpgroup&) {
  const int own = int(block->current().thread.x), begin = own / 128 * 128;
  for (int t = begin; t < begin + 128; ++t)
    if (t != own) block->wake(t);
}

void Hopper::products_begin() { group().lanes[block->current().thread.x % 128].begun = true; }

void Hopper::product(float* d, const Product& own, const uint32_t* a) {
  Warpgroup& g = group();
  Fiber& fiber = block->current();
  Lane& lane = g.lanes[fiber.thread.x % 128];
  if (!lane.begun) fail("a product without products_begin after other uses of its registers");
  lane.own = own;
  lane.d = d;
  if (a) std::copy(a, a + 4, lane.a);
  if (mistake.name == "wrong-operand" && fiber.products++ == mistake.at) lane.own.b ^= 0x2000;
  if (!together(g, "product")) return;
  for (const Lane& other : g.lanes)
    if (other.own.a != lane.own.a || other.own.b != lane.own.b || other.groups != lane.groups)
      fail("the lanes of a warpgroup differ in a product's operands or its group");
  std::vector<Operands> lanes;
  for (Lane& each : g.lanes) {
    std::vector<float>& kept = each.kept[each.d];
    if (kept.empty()) {
      kept.assign(each.d, each.d + own.columns / 2);
      std::fill(each.d, each.d + own.columns / 2, NAN);
    }
    lanes.push_back({each.d, {each.a[0], each.a[1], each.a[2], each.a[3]}});
  }
  // Any lane may start it: another one each time is asked for what it knows.
  const int starter = int(fiber.thread.x) / 128 * 128 + g.checked++ * 37 % 128;
  if (!own.registers) read_operand(lane.own, false, starter);
  read_operand(lane.own, true, starter);
  g.pending.push_back({lane.own, lane.groups, std::move(lanes)});
  release(g);
}

// The reading itself is done when the product is; here only who reads what is noted.
void Hopper::read_operand(const Product& p, bool b, int starter) {
  const uint64_t operand = b ? p.b : p.a;
  if (operand >> 46 || (operand >> 14 & 3) || (operand >> 30 & 3))
    fail("an operand's descriptor %llx has bits that say swizzling or nothing",
         (unsigned long long)operand);
  const int rows = b ? p.columns : 64, engine = engine_of(*block, starter / 128);
  int other = 0;
  for (int row = 0; row < rows; ++row)
    for (int half = 0; half < 2; ++half) {
      const int64_t offset = p.registers ? column_offset(operand, row / 8, row % 8 * 2 + half)
                                         : row_offset(operand, row, half);
      if (offset < 0 || offset + 16 > block->size())
        fail("a product reads shared byte %lld, which is outside of %lld", (long long)offset,
             (long long)block->size());
      Cell& read = cell(*block, uint32_t(offset));
      const char* wrong = order_.read_by(read, engine, member(*block, starter), other);
      say(wrong, *block, uint32_t(offset), other);
    }
}

void Hopper::products_commit() {
  const int thread = int(block->current().thread.x);
  Warpgroup& g = group();
  ++g.lanes[thread % 128].groups;
  // The last lane to commit ends the group's time.
  int least = g.lanes[0].groups;
  for (const Lane& lane : g.lanes) least = lane.groups < least ? lane.groups : least;
  if (least == int(g.times.size())) return;
  const int engine = engine_of(*block, thread / 128);
  g.times.push_back(order_.of(engine)[size_t(engine)]);
  order_.tick(engine);
}

void Hopper::products_wait(int pending) {
  Fiber& own = block->current();
  if (mistake.name == "skip-products-wait" && own.waits++ == mistake.at) return;
  Warpgroup& g = group();
  g.lanes[own.thread.x % 128].pending = pending;
  if (!together(g, "products_wait")) return;
  const int ended = int(g.times.size()) - pending;  // groups
  std::vector<Pending> later;
  for (const Pending& p : g.pending)
    if (p.group < ended)
      multiply(g, p);
    else
      later.push_back(p);
  g.pending = later;
  const int begin = int(own.thread.x) / 128 * 128, engine = engine_of(*block, begin / 128);
  for (int i = 0; i < 128; ++i) {
    Lane& lane = g.lanes[i];
    if (lane.pending != pending || lane.groups != g.lanes[0].groups)
      fail("the lanes of a warpgroup wait for different products");
    if (ended > 0) {
      uint32_t& known = order_.of(member(*block, begin + i))[size_t(engine)];
      const uint32_t time = g.times[size_t(ended - 1)];
      known = known < time ? time : known;
    }
    if (later.empty() && !lane.kept.empty()) {
      for (const auto& [d, kept] : lane.kept) std::copy(kept.begin(), kept.end(), d);
      lane.kept.clear();
      lane.begun = false;
    }
  }
  release(g);
}

void Hopper::multiply(Warpgroup& g, const Pending& pending) {
  const Product& p = pending.product;
  static thread_local float a[64][16], b[256][16];
  auto fetch = [&](uint64_t operand, int rows, float (*to)[16]) {
    for (int row = 0; row < rows; ++row)
      for (int half = 0; half < 2; ++half) {
        uint16_t bits[8];
        std::memcpy(bits, block->memory(uint32_t(row_offset(operand, row, half))), 16);
        for (int i = 0; i < 8; ++i) to[row][half * 8 + i] = p.widen(bits[i]);
      }
  };
  if (p.registers) {
    for (int lane = 0; lane < 128; ++lane)
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8;
        const uint32_t both = pending.lanes[size_t(lane)].a[i / 2];
        a[row][i / 4 * 8 + lane % 4 * 2 + i % 2] = p.widen(both >> i % 2 * 16 & 0xFFFF);
      }
    for (int eight = 0; eight < p.columns / 8; ++eight)
      for (int k = 0; k < 16; ++k) {
        uint16_t bits[8];
        std::memcpy(bits, block->memory(uint32_t(column_offset(p.b, eight, k))), 16);
        for (int i = 0; i < 8; ++i) b[eight * 8 + i][k] = p.widen(bits[i]);
      }
  } else {
    fetch(p.a, 64, a);
    fetch(p.b, p.columns, b);
  }
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < p.columns; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      const int lane = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      std::vector<float>& kept = g.lanes[lane].kept[pending.lanes[size_t(lane)].d];
      kept[size_t(column / 8 * 4 + row % 16 / 8 * 2 + column % 2)] += sum;
    }
}

}  // namespace hetconv::host
