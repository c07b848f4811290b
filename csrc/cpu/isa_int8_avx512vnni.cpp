// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define HETCONV_NS int8_avx512vnni
#define HETCONV_VECTOR_BYTES 64
#include "int8_micro_avx512.h"
// What the tiles are is known from here on.
#include "int8_fprop.h"
#include "int8_ops.h"

namespace hetconv {
extern const Int8Kernels int8_kernels_avx512vnni =
    HETCONV_INT8_KERNELS(avx512vnni, 1.7, 1.2, /*signed_bytes=*/false, /*pixels=*/true);
}
#endif
