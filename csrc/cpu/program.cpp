// SPDX-License-Identifier: Apache-2.0
#include "program.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>

#include "threads.h"

namespace hetconv {
namespace {

constexpr size_t kFew = 16;  // addresses that need no memory of their own

}  // namespace

void Program::add(std::shared_ptr<const Step> step, std::vector<Place> operands) {
  if (!step || int(operands.size()) != step->operands())
    throw std::invalid_argument("a step has another number of operands");
  for (const Place& place : operands) {
    if (place.base < -1) throw std::invalid_argument("a place has no base");
    if (place.base >= bases_) bases_ = place.base + 1;
  }
  if (operands.size() > most_) most_ = operands.size();
  steps_.push_back({std::move(step), std::move(operands)});
}

void Program::run(char* const* bases, int threads) const {
  char* few[kFew];
  std::vector<char*> many(most_ > kFew ? most_ : 0);
  char** at = most_ > kFew ? many.data() : few;
  for (const Bound& bound : steps_) {
    for (size_t i = 0; i < bound.operands.size(); ++i) {
      const Place& place = bound.operands[i];
      at[i] = place.base < 0 ? nullptr : bases[place.base] + place.offset;
    }
    bound.step->run(at, threads);
  }
}

void Program::run_parts(char* const* bases, const int64_t* strides, int64_t parts,
                        int workers) const {
  std::atomic<int64_t> next(0);
  std::exception_ptr thrown;
  std::mutex throwing;
  in_parallel(std::min<int64_t>(usable_threads(workers), parts), [&](int worker) {
    try {
      char* few[kFew];
      std::vector<char*> many(bases_ > int(kFew) ? size_t(bases_) : 0);
      char** at = bases_ > int(kFew) ? many.data() : few;
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
        for (int i = 0; i < bases_; ++i) at[i] = bases[i] + strides[i] * (i ? part : worker);
        run(at, 1);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(throwing);
      thrown = std::current_exception();
      next.store(parts, std::memory_order_relaxed);
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

namespace {
thread_local Tape* tape = nullptr;
}

Tape* Tape::current() { return tape; }

void Tape::start() {
  if (running_) throw std::invalid_argument("the tape runs already");
  before_ = tape;
  tape = this;
  running_ = true;
}

void Tape::stop() {
  if (running_ && tape == this) tape = before_;
  running_ = false;
}

}  // namespace hetconv
