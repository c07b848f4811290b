// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define HETCONV_NS avx512
#define HETCONV_VECTOR_BYTES 64
#include "isa.h"
#include "isa_steps.h"
#include "mask_loops.h"

namespace hetconv {
extern const Kernels kernels_avx512 = HETCONV_KERNELS(avx512);
extern const StepLoops step_loops_avx512 = HETCONV_STEP_LOOPS;
extern const MaskLoops mask_loops_avx512 = HETCONV_MASK_LOOPS;
}  // namespace hetconv
#endif
