// SPDX-License-Identifier: Apache-2.0
// Saved programs: every class of step goes into a file and comes back as it was; a file that was
// damaged is refused; one that was changed and sealed anew is refused or harmless.
#include <algorithm>
#include <cstring>
#include <thread>

#include "../../csrc/cpu/blake2.h"
#include "../../csrc/include/hetconv.h"
#include "network.h"

namespace driver {

using namespace hetconv;

namespace {

constexpr size_t kHead = 24, kDigest = 16;
constexpr int64_t kMostBytes = 1 << 24;  // of what a changed file may ask for and is run

std::vector<std::string> run_saved(SavedProgram& saved,
                                   const std::vector<std::vector<char>>& inputs, int threads) {
  std::vector<const void*> from;
  std::vector<void*> to;
  std::vector<std::unique_ptr<char[]>> outputs;
  for (const auto& one : inputs) from.push_back(one.data());
  for (const TensorSpec& t : saved.about().outputs) {
    outputs.emplace_back(new char[size_t(t.bytes())]());
    to.push_back(outputs.back().get());
  }
  saved.run(from.data(), to.data(), threads);
  std::vector<std::string> found;
  for (size_t i = 0; i < outputs.size(); ++i)
    found.emplace_back(outputs[i].get(), size_t(saved.about().outputs[i].bytes()));
  return found;
}

void seal(std::string* file) {
  const uint64_t size = file->size() - kHead - kDigest;
  std::memcpy(&(*file)[16], &size, sizeof size);
  blake2b(file->data(), kHead, file->data() + kHead + kDigest, size_t(size),
          reinterpret_cast<uint8_t*>(&(*file)[kHead]), kDigest);
}

bool is_refused(const std::string& file) {
  // Memory of its very size, so that a byte read behind it shows.
  const std::unique_ptr<char[]> exact(new char[file.size() + 1]);
  std::memcpy(exact.get() + 1, file.data(), file.size());
  hc_program* program = nullptr;
  const hc_status status = hc_load_memory(exact.get() + 1, file.size(), &program);
  hc_free(program);
  return status == HC_FILE && !program && *hc_error();
}

// Loads a file that was changed and sealed; runs it, where it is not refused.
void survive(const std::string& file, Random& r) {
  try {
    SavedProgram program(file.data(), file.size());
    int64_t bytes = program.about().arena;
    std::vector<std::vector<char>> inputs;
    for (const auto* list : {&program.about().inputs, &program.about().outputs})
      for (const TensorSpec& t : *list) bytes += t.bytes();
    if (bytes > kMostBytes) return;
    for (const TensorSpec& t : program.about().inputs) {
      inputs.emplace_back(size_t(t.bytes()));
      for (char& v : inputs.back()) v = char(pick(r, 0, 255));
    }
    run_saved(program, inputs, pick(r, 1, 3));
  } catch (const FileError&) {
  } catch (const std::bad_alloc&) {}
}

void change(std::string* file, Random& r) {
  const size_t from = kHead + kDigest;
  const size_t at = from + size_t(r() % (file->size() - from));
  const size_t width = size_t(1) << pick(r, 0, 3);
  const int64_t values[] = {0,
                            1,
                            -1,
                            2,
                            7,
                            63,
                            64,
                            65,
                            127,
                            128,
                            255,
                            1 << 16,
                            (1 << 30) - 1,
                            1 << 30,
                            INT32_MAX,
                            INT32_MIN,
                            int64_t(1) << 40,
                            INT64_MAX,
                            INT64_MIN};
  int64_t value = values[size_t(pick(r, 0, 18))];
  if (chance(r, 0.4)) value = int64_t(r());
  if (chance(r, 0.3)) {  // a little more or less than it was
    int64_t old = 0;
    std::memcpy(&old, file->data() + at, std::min(width, file->size() - at));
    value = int64_t(uint64_t(old) + uint64_t(pick(r, -3, 3)));
  }
  std::memcpy(&(*file)[at], &value, std::min(width, file->size() - at));
}

}  // namespace

std::string check_program(const Case& c) {
  Made made(c);
  const std::string file = made.file();
  const auto inputs = made.inputs();
  const auto expected = made.run(inputs);
  SavedProgram saved(file.data(), file.size());
  for (const int threads : {1, 3})
    if (run_saved(saved, inputs, threads) != expected) return "a saved program computes otherwise";
  std::vector<std::thread> callers;
  std::vector<int> wrong(3, 0);
  for (size_t k = 0; k < wrong.size(); ++k)
    callers.emplace_back([&, k] { wrong[k] = run_saved(saved, inputs, 1) != expected; });
  for (std::thread& t : callers) t.join();
  if (wrong != std::vector<int>(3, 0)) return "a saved program computes otherwise in some thread";

  if (made.layer(inputs, true) != made.layer(inputs, false))
    return "images one by one are computed otherwise than a batch";

  Random r(c.seed + 7);
  for (int i = 0; i < 12; ++i) {
    std::string flipped = file;
    flipped[size_t(r() % file.size())] ^= char(1 << pick(r, 0, 7));
    if (!is_refused(flipped)) return "a file with a flipped bit was taken";
    std::string cut = file.substr(0, size_t(r() % file.size()));
    if (!is_refused(cut)) return "a file that was cut was taken";
    if (cut.size() < kHead + kDigest) continue;
    seal(&cut);
    if (!is_refused(cut)) return "a file that was cut and sealed was taken";
  }
  for (int i = 0; i < 40; ++i) {
    std::string changed = file;
    for (int k = pick(r, 1, 3); k > 0; --k) change(&changed, r);
    seal(&changed);
    survive(changed, r);
  }
  return {};
}

}  // namespace driver
