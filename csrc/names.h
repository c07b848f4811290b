// SPDX-License-Identifier: Apache-2.0
// Types and activations by the names that Python gives them; for the bindings of the engines.
#pragma once
#include <stdexcept>
#include <string>

#include "types.h"

namespace hetconv {

inline DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::invalid_argument("dtype '" + name + "' is not float32, float64, bfloat16 or float16");
}

inline Act act_named(const std::string& name) {
  if (name.empty() || name == "none") return Act::none;
  if (name == "relu") return Act::relu;
  if (name == "relu6") return Act::relu6;
  if (name == "silu") return Act::silu;
  if (name == "gelu") return Act::gelu;
  throw std::invalid_argument("activation '" + name + "' is not none, relu, relu6, silu or gelu");
}

}  // namespace hetconv
