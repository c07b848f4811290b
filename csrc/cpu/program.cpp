// SPDX-License-Identifier: Apache-2.0
#include "program.h"

#include <stdexcept>

namespace hetconv {

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
  constexpr size_t kFew = 16;
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
