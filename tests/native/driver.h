// SPDX-License-Identifier: Apache-2.0
// What the parts of the native test share: one random call of the engine, and what can be done with
// it. All values are small multiples of a power of two, so that every sum is exact in every dtype
// that sums, in any order: results are compared bit by bit.
#pragma once
#include <string>

#include "../../csrc/cpu/dgrad.h"
#include "../../csrc/cpu/int8_plan.h"
#include "../../csrc/cpu/wgrad.h"
#include "reference.h"
#include "tensor.h"

namespace driver {

struct Case {
  uint64_t seed;
  const hetconv::Kernels* isa;
  Conv conv;
  DType dtype, weight_dtype;
  std::string mask_kind, form;
  hetconv::Act act;
  bool scale, shift, residual, channels_last;
  int threads;
  bool planted;  // one element is NaN or infinite
  std::string describe() const;
};

Case random_case(uint64_t seed, const hetconv::Kernels& isa);
// A case whose mask, dtype, form and ISA are those of `like`, on another image.
Case another_image(const Case& like, uint64_t seed);

// Each returns what went wrong, or nothing.
std::string check_fprop(const Case& c, const hetconv::Plan& plan);
std::string check_dgrad(const Case& c);
std::string check_wgrad(const Case& c, const hetconv::Wgrad& wgrad);
// A case's layer in 8 bits, and what stands between layers.
std::string check_int8(const Case& c, const hetconv::Int8Kernels& isa);
// A case's layer as a part of a program that is saved, read, damaged and changed.
std::string check_program(const Case& c);

size_t largest_workspace();  // bytes asked for by any thread since the last time this was asked

// Deliberate mistakes, one for each sanitizer; each must end the process.
int make_mistake(const std::string& name);
// Calls of many sizes: none may take more workspace than it is allowed.
int check_workspaces(const hetconv::Kernels& isa);

}  // namespace driver
