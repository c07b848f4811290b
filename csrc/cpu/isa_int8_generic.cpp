// SPDX-License-Identifier: Apache-2.0
#define HETCONV_NS int8_generic
#define HETCONV_VECTOR_BYTES 16
#include "int8_micro_generic.h"
// What the tiles are is known from here on.
#include "int8_fprop.h"
#include "int8_ops.h"

namespace hetconv {
extern const Int8Kernels int8_kernels_generic = HETCONV_INT8_KERNELS(generic, 1.5, 1.5);
}
