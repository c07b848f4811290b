// SPDX-License-Identifier: Apache-2.0
// A program: steps one after another on places in memory, run by one call.
#pragma once
#include <utility>

#include "steps.h"

namespace hetconv {

// An operand: `offset` bytes behind the address number `base` of a call; base -1: null.
struct Place {
  int base;
  int64_t offset;
};

class Program {
 public:
  // Throws std::invalid_argument where a step has another number of operands.
  void add(std::shared_ptr<const Step> step, std::vector<Place> operands);
  int bases() const { return bases_; }  // addresses that a call gives
  size_t size() const { return steps_.size(); }
  const Step& step(size_t i) const { return *steps_[i].step; }
  const std::vector<Place>& places(size_t i) const { return steps_[i].operands; }
  // From several threads at once, where the memory that they write is not shared. threads: 0 = as
  // many as each step was made for.
  void run(char* const* bases, int threads = 0) const;
  // The same of a batch in parts, each by one of `workers` threads, for a program of one part.
  // strides: bytes from what a base holds of one part to the next; of base 0, from the arena of one
  // worker to the next.
  void run_parts(char* const* bases, const int64_t* strides, int64_t parts, int workers) const;

 private:
  struct Bound {
    std::shared_ptr<const Step> step;
    std::vector<Place> operands;
  };
  std::vector<Bound> steps_;
  int bases_ = 0;
  size_t most_ = 0;  // operands of a step
};

// The steps that this thread's calls of the engine are, with the addresses of their operands, from
// start() to stop(). Tapes nest: only the last one that was started notes.
class Tape {
 public:
  struct Noted {
    std::shared_ptr<const Step> step;
    std::vector<uintptr_t> operands;
  };
  ~Tape() { stop(); }
  void start();
  void stop();
  static Tape* current();
  void note(std::shared_ptr<const Step> step, std::vector<uintptr_t> operands) {
    noted_.push_back({std::move(step), std::move(operands)});
  }
  std::vector<Noted> take() { return std::exchange(noted_, {}); }

 private:
  std::vector<Noted> noted_;
  Tape* before_ = nullptr;
  bool running_ = false;
};

}  // namespace hetconv
