// SPDX-License-Identifier: Apache-2.0
// 16-byte vectors of whatever the compiler's baseline is: SSE2 on x86-64, NEON on aarch64.
#define HETCONV_NS generic
#define HETCONV_VECTOR_BYTES 16
#include "isa.h"
#include "isa_steps.h"
#include "mask_loops.h"

namespace hetconv {
extern const Kernels kernels_generic = HETCONV_KERNELS(generic);
extern const StepLoops step_loops_generic = HETCONV_STEP_LOOPS;
extern const MaskLoops mask_loops_generic = HETCONV_MASK_LOOPS;
}  // namespace hetconv
