// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <string>
#include <vector>
#include "plan.h"

namespace hetconv {

// ISAs that this machine can run, best first; $HETCONV_ISA keeps only the one it names.
std::vector<const Kernels*> available_isas();
const Kernels& isa_named(const std::string& name);  // "" = the best; throws std::invalid_argument

// Packed weights of one plan, 64-byte aligned.
class Packed {
 public:
  Packed(const Plan& plan, const WeightView& w, DType from, int threads);
  const void* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  std::unique_ptr<void, void (*)(void*)> data_;
};

int usable_threads(int threads);  // one after a fork: the OpenMP runtime's pool does not survive it
// Where there is one output, its stride has no meaning and may be beyond all other integers: it
// becomes 1.
void forget_idle_strides(Problem* p);
// False: it cannot be pooled as it is computed, and nothing was written. Throws
// std::invalid_argument for a stride or a dilation that the plan's form is not for.
bool fprop(const Plan& plan, const Packed& packed, Problem p);

}  // namespace hetconv
