// SPDX-License-Identifier: Apache-2.0
// Element types and activations, of every engine. No functions here (see cpu/problem.h).
#pragma once

namespace hetconv {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Act : int { none = 0, relu = 1, relu6 = 2, silu = 3, gelu = 4 };

}  // namespace hetconv
