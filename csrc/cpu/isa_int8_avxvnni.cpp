// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define HETCONV_NS int8_avxvnni
#define HETCONV_VECTOR_BYTES 32
#include "int8_micro_avx2.h"
// What the tiles are is known from here on.
#include "int8_fprop.h"
#include "int8_ops.h"

namespace hetconv {
extern const Int8Kernels int8_kernels_avxvnni = HETCONV_INT8_KERNELS(avxvnni, 1.6, 1.6);
}
#endif
