// SPDX-License-Identifier: Apache-2.0
#if defined(__aarch64__)
#define HETCONV_NS int8_neondot
#define HETCONV_VECTOR_BYTES 16
#include "int8_micro_neon.h"
// What the tiles are is known from here on.
#include "int8_fprop.h"
#include "int8_ops.h"

namespace hetconv {
extern const Int8Kernels int8_kernels_neondot =
    HETCONV_INT8_KERNELS(neondot, 1.6, 1.6, /*signed_bytes=*/true);
}
#endif
