// SPDX-License-Identifier: Apache-2.0
// Tensors between guard pages: one byte before or behind the memory is a crash, and what lies
// between the elements is NaN that must stay as it is.
#pragma once
#include <cstddef>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/problem.h"
#include "reference.h"

namespace driver {

using hetconv::DType;
using Random = std::mt19937_64;

// Returns an integer of [low, high].
int pick(Random& r, int low, int high);
inline bool chance(Random& r, double p) { return std::uniform_real_distribution<>()(r) < p; }

size_t size_of(DType d);
const char* name_of(DType d);
double round_to(DType d, double v);  // to the nearest, ties to even

// Memory with an unreadable page on either side; the bytes stand at its very start or very end.
class Guarded {
 public:
  Guarded(size_t bytes, bool at_the_end);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* data() const { return data_; }
  void read_only();           // a write crashes from now on
  bool slack_intact() const;  // the rest of the pages still holds 0xff

 private:
  char *base_, *data_;
  size_t bytes_, inner_;
};

class Tensor {
 public:
  // may_repeat: an axis may have the stride 0, as torch's expand makes it; then all its values are
  // made equal.
  Tensor(Random& r, DType dtype, const std::vector<int64_t>& shape, bool may_repeat);
  void fill(Values& values);  // values of a repeated axis are overwritten by its first
  Values read() const;
  void read_only() { memory_->read_only(); }
  // No byte beside the elements was written.
  bool gaps_intact() const;
  hetconv::View view() const;
  std::string describe() const;
  int64_t strides[4];

 private:
  char* at(const int64_t index[4]) const;
  template <class Visit> void each(Visit visit) const;
  DType dtype_;
  int64_t shape_[4], offset_, span_;
  std::unique_ptr<Guarded> memory_;
};

}  // namespace driver
