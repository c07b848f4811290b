// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define HETCONV_NS avx2
#define HETCONV_VECTOR_BYTES 32
#include "isa.h"
#include "isa_steps.h"
#include "mask_loops.h"

namespace hetconv {
extern const Kernels kernels_avx2 = HETCONV_KERNELS(avx2);
extern const StepLoops step_loops_avx2 = HETCONV_STEP_LOOPS;
extern const MaskLoops mask_loops_avx2 = HETCONV_MASK_LOOPS;
}  // namespace hetconv
#endif
