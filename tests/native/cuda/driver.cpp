// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda on the CPU, on the cases of a file.
//
//   driver CASES RESULTS [SEED [MISTAKE AT]]
//
// CASES is a row of cases, each: the count of numbers, then for each 24 bytes of name and an int64;
// the count of arrays, then for each 24 bytes of name, an int64 of bytes, and those. A case runs
// fprop of narrow, wide or scattered groups (with packing) or wgrad of narrow or wide ones (with
// the sum of its partials), as its number `kind` says, the place in kRunners, and its array
// `result`, which the kernels write, is appended to RESULTS. All arrays have memory of just their
// size.
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../../csrc/cuda/narrow.h"
#include "../../../csrc/cuda/scattered.h"
#include "../../../csrc/cuda/wide_wgrad.h"
#include "machine.h"

using namespace hetconv::cuda;

namespace {

struct Buffer {
  char* data = nullptr;
  int64_t size = 0;
};

struct Case {
  std::map<std::string, int64_t> numbers;
  std::map<std::string, Buffer> arrays;

  ~Case() {
    for (auto& [name, buffer] : arrays) std::free(buffer.data);
  }
  int64_t number(const char* name) const {
    const auto found = numbers.find(name);
    if (found == numbers.end()) hetconv::host::fail("the case has no number %s", name);
    return found->second;
  }
  template <class T> T* array(const char* name) const {
    const auto found = arrays.find(name);
    return found == arrays.end() ? nullptr : reinterpret_cast<T*>(found->second.data);
  }
  int64_t size(const char* name) const { return arrays.at(name).size; }
};

int64_t read_int(std::istream& in) {
  int64_t v = 0;
  in.read(reinterpret_cast<char*>(&v), 8);
  return v;
}

std::string read_name(std::istream& in) {
  char name[25] = {};
  in.read(name, 24);
  return name;
}

bool read_case(std::istream& in, Case& c) {
  const int64_t numbers = read_int(in);
  if (!in) return false;
  for (int64_t i = 0; i < numbers; ++i) {
    const std::string name = read_name(in);
    c.numbers[name] = read_int(in);
  }
  const int64_t arrays = read_int(in);
  for (int64_t i = 0; i < arrays; ++i) {
    Buffer& b = c.arrays[read_name(in)];
    b.size = read_int(in);
    b.data = static_cast<char*>(std::malloc(size_t(b.size)));
    in.read(b.data, b.size);
  }
  return bool(in);
}

void check(const char* error) {
  if (error) hetconv::host::fail("%s", error);
}

void check_shared(const Case& c, int64_t found) {
  const int64_t said = c.number("shared");
  if (found != said)
    hetconv::host::fail("%lld bytes of shared memory, the lowering said %lld", (long long)found,
                        (long long)said);
}

using Slabs = std::unique_ptr<void, decltype(&std::free)>;

// malloc aligns to 16 bytes, and the sanitizer watches just what was asked for.
Slabs packed(const Case& c, DType dtype) {
  const int64_t size = c.size("source") / 4;
  Slabs slabs(std::malloc(size_t(size * (dtype == DType::f32 ? 4 : 2))), std::free);
  check(narrow_pack(c.array<void>("w"), DType(c.number("w_dtype")), c.array<int32_t>("source"),
                    slabs.get(), dtype, size, nullptr));
  return slabs;
}

#define NUMBER(name) p.name = int32_t(c.number(#name))

// Runs fprop or dgrad: C is Narrow, Wide or Scattered, and `fill` what only that one has.
template <class C, class Fill>
void gather(const Case& c, Fill fill, int64_t (*shared_bytes)(const C&),
            const char* (*start)(const C&, DType, void*)) {
  C p{};
  p.x = c.array<void>("x");
  p.y = c.array<void>("result");
  p.residual = c.array<void>("residual");
  p.scale = c.array<float>("scale");
  p.shift = c.array<float>("shift");
  p.x_n = c.number("x_n");
  p.y_n = c.number("y_n");
  NUMBER(x_h), NUMBER(x_w), NUMBER(y_h), NUMBER(y_w);
  NUMBER(batch), NUMBER(image_h), NUMBER(image_w);
  fill(p);
  p.act = Act(c.number("act"));
  const DType dtype = DType(c.number("dtype"));
  check_shared(c, shared_bytes(p));
  const Slabs slabs = packed(c, dtype);
  p.slabs = slabs.get();
  check(start(p, dtype, nullptr));
}

void narrow_case(const Case& c) {
  gather<Narrow>(
      c,
      [&](Narrow& p) {
        p.classes = c.array<int32_t>("classes");
        p.heads = c.array<int32_t>("heads");
        p.rounds = c.array<int32_t>("rounds");
        p.lists = c.array<int32_t>("lists");
        p.words = c.array<int32_t>("words");
        p.chunks = c.array<int32_t>("chunks");
        p.slots = c.array<int32_t>("slots");
        p.rows = c.array<int32_t>("rows");
        NUMBER(class_count), NUMBER(parts), NUMBER(round_count);
        NUMBER(tile_h), NUMBER(tile_w), NUMBER(warps_m), NUMBER(warps_n);
        NUMBER(raw_pitch), NUMBER(slot_pitch), NUMBER(halo_pixels);
        NUMBER(max_words), NUMBER(max_fragments), NUMBER(vector_stores);
        NUMBER(buffers), NUMBER(resident), NUMBER(blocks), NUMBER(item), NUMBER(split);
        NUMBER(channels), NUMBER(tma);
        const int32_t* halo = c.array<int32_t>("halos");
        for (int i = 0; p.tma && i < p.class_count && i < kMostMaps; ++i, halo += 2)
          p.box_h[i] = halo[0], p.box_w[i] = halo[1];
      },
      &narrow_shared_bytes, &narrow_fprop);
}

void wide_case(const Case& c) {
  gather<Wide>(
      c,
      [&](Wide& p) {
        p.classes = c.array<int32_t>("classes");
        p.heads = c.array<int32_t>("heads");
        p.blocks = c.array<int32_t>("blocks");
        p.steps = c.array<int32_t>("steps");
        p.rows = c.array<int32_t>("rows");
        NUMBER(class_count), NUMBER(pairs), NUMBER(pixels), NUMBER(flat_pitch), NUMBER(plane_pitch);
        NUMBER(stages), NUMBER(slots), NUMBER(cluster), NUMBER(grid);
      },
      &wide_shared_bytes, &wide_fprop);
}

void scattered_case(const Case& c) {
  gather<Scattered>(
      c,
      [&](Scattered& p) {
        p.parts = c.array<int32_t>("parts");
        p.blocks = c.array<int32_t>("blocks");
        p.segments = c.array<int32_t>("segments");
        p.begins = c.array<int32_t>("begins");
        p.jobs = c.array<int32_t>("jobs");
        p.spans = c.array<int32_t>("spans");
        p.steps = c.array<int32_t>("steps");
        p.columns = c.array<int32_t>("columns");
        NUMBER(channels), NUMBER(out_h), NUMBER(out_w), NUMBER(base_h), NUMBER(base_w);
        NUMBER(part_count), NUMBER(most_blocks), NUMBER(side), NUMBER(warps), NUMBER(pixel_bytes);
        NUMBER(width);
      },
      &scattered_shared_bytes, &scattered_fprop);
}

// Runs wgrad, and adds its partials up: C is NarrowWgrad or WideWgrad.
template <class C>
void gradient(const Case& c, C& p, int64_t size, int32_t splits, int64_t (*shared_bytes)(const C&),
              const char* (*start)(const C&, DType, void*)) {
  p.x = c.array<void>("x");
  p.dy = c.array<void>("dy");
  p.x_n = c.number("x_n");
  NUMBER(x_h), NUMBER(x_w), NUMBER(batch), NUMBER(image_h), NUMBER(image_w);
  const DType dtype = DType(c.number("dtype"));
  check_shared(c, shared_bytes(p));
  std::vector<float> partials(size_t(size * splits), __builtin_nanf(""));
  p.partials = partials.data();
  check(start(p, dtype, nullptr));
  check(narrow_reduce(p.partials, c.array<int32_t>("targets"), c.array<void>("result"), size,
                      c.number("dw_size"), splits, DType(c.number("w_dtype")), nullptr));
}

void narrow_gradient(const Case& c) {
  NarrowWgrad p{};
  p.geometry = c.array<int32_t>("geometry");
  p.heads = c.array<int32_t>("heads");
  p.units = c.array<int32_t>("units");
  p.chunks = c.array<int32_t>("chunks");
  p.slots = c.array<int32_t>("slots");
  p.y_n = c.number("y_n");
  NUMBER(y_h), NUMBER(y_w), NUMBER(parts), NUMBER(unit_count);
  NUMBER(tile_h), NUMBER(tile_w), NUMBER(warps);
  NUMBER(x_pitch), NUMBER(x_slot_pitch), NUMBER(dy_pitch), NUMBER(dy_slot_pitch);
  NUMBER(halo_pixels), NUMBER(buffers), NUMBER(blocks), NUMBER(tma);
  NUMBER(channels), NUMBER(filters), NUMBER(dy_h), NUMBER(dy_w), NUMBER(halo_h), NUMBER(halo_w);
  const int64_t size = int64_t(p.unit_count) * kUnitValues;
  gradient(c, p, size, p.blocks, &narrow_wgrad_shared_bytes, &narrow_wgrad);
}

void wide_gradient(const Case& c) {
  WideWgrad p{};
  p.classes = c.array<int32_t>("classes");
  p.jobs = c.array<int32_t>("jobs");
  p.blocks = c.array<int32_t>("blocks");
  p.places = c.array<int32_t>("places");
  p.dy_n = c.number("dy_n");
  NUMBER(dy_h), NUMBER(dy_w), NUMBER(out_h), NUMBER(out_w);
  NUMBER(job_count), NUMBER(products), NUMBER(tile_rows), NUMBER(most_blocks);
  NUMBER(x_pitch), NUMBER(dy_pitch), NUMBER(stages), NUMBER(splits);
  const int64_t size = c.size("places") / 4 * wide::kProductValues;
  gradient(c, p, size, p.splits, &wide_wgrad_shared_bytes, &wide_wgrad);
}

#undef NUMBER

using Runner = void (*)(const Case&);
constexpr Runner kRunners[] = {narrow_case, narrow_gradient, wide_case, scattered_case,
                               wide_gradient};

}  // namespace

int main(int count, char** arguments) {
  if (count < 3 || count == 5 || count > 6)
    hetconv::host::fail("usage: driver CASES RESULTS [SEED [MISTAKE AT]]");
  if (count > 3) hetconv::host::seed = unsigned(std::atoi(arguments[3]));
  if (count == 6) hetconv::host::mistake = {arguments[4], std::atoll(arguments[5])};
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  if (!in || !out) hetconv::host::fail("%s or %s cannot be opened", arguments[1], arguments[2]);
  while (in.peek() != EOF) {
    Case c;
    if (!read_case(in, c)) hetconv::host::fail("the file of cases ends in the middle of one");
    const int64_t kind = c.number("kind");
    if (kind < 0 || kind >= int64_t(std::size(kRunners)))
      hetconv::host::fail("no kernel is number %lld", (long long)kind);
    kRunners[kind](c);
    out.write(c.array<char>("result"), c.size("result"));
  }
  return 0;
}
