/* SPDX-License-Identifier: Apache-2.0 */
/* Runs networks that hetconv_kernels.export.program saved: no Python, no PyTorch. C99 and C++.
 *
 *   hc_program* program;
 *   if (hc_load("network.hc", &program) != HC_OK) return fail(hc_error());
 *   const void* inputs[] = {x};
 *   void* outputs[] = {y};
 *   if (hc_run(program, inputs, outputs, 0) != HC_OK) return fail(hc_error());
 *   hc_free(program);
 *
 * All functions may be called from any thread at any time, also with the same program; only hc_free
 * must be the last call with it. Nothing is written to a terminal, and no exception comes out.
 */
#ifndef HETCONV_H
#define HETCONV_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HC_API __attribute__((visibility("default")))
#else
#define HC_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define HC_MAX_AXES 8

typedef enum hc_status {
  HC_OK = 0,
  HC_ARGUMENT = 1, /* an argument that the call cannot work with */
  HC_FILE = 2,     /* a file that cannot be read, is damaged or of another kind or version */
  HC_MEMORY = 3,   /* this machine has not as much memory */
  HC_INTERNAL = 4  /* a fault of this library */
} hc_status;

typedef enum hc_dtype {
  HC_FLOAT32 = 0,
  HC_FLOAT64 = 1,
  HC_BFLOAT16 = 2,
  HC_FLOAT16 = 3,
  HC_UINT8 = 4,
  HC_INT8 = 5
} hc_dtype;

/* What an input or output looks like in memory. */
typedef struct hc_tensor {
  const char* name; /* until hc_free */
  hc_dtype dtype;
  int axes;
  int64_t shape[HC_MAX_AXES];   /* N, C, H, W of images */
  int64_t strides[HC_MAX_AXES]; /* in elements: element (n, c, h, w) is at n*strides[0] + ... */
  size_t bytes;                 /* from the first element to the end of the last */
} hc_tensor;

typedef struct hc_program hc_program;

/* Reads a file, checks all of it and packs its weights for this processor. On failure *program is
 * NULL. */
HC_API hc_status hc_load(const char* path, hc_program** program);
/* The same from memory, which is not needed any more afterwards. */
HC_API hc_status hc_load_memory(const void* data, size_t size, hc_program** program);
/* Frees a program; NULL is nothing to do. */
HC_API void hc_free(hc_program* program);

/* How many inputs and outputs a call has; 0 of NULL. */
HC_API int hc_inputs(const hc_program* program);
HC_API int hc_outputs(const hc_program* program);
HC_API hc_status hc_input(const hc_program* program, int index, hc_tensor* tensor);
HC_API hc_status hc_output(const hc_program* program, int index, hc_tensor* tensor);

/* Computes. Each address is that of a tensor's first element, aligned to its elements; outputs
 * share no memory with inputs or with one another. threads: 0 = as many as OpenMP takes, which
 * OMP_NUM_THREADS says. The numbers do not depend on it. Calls at the same time each take an arena
 * of their own, which is kept for a later call; so a steady call allocates nothing. On failure the
 * outputs may hold anything. After a fork a child computes in one thread. */
HC_API hc_status hc_run(hc_program* program, const void* const* inputs, void* const* outputs,
                        int threads);
/* Frees the arenas that no call is using; returns their bytes. The next calls take new ones. */
HC_API size_t hc_release(hc_program* program);

/* What went wrong in the last call of this thread that failed; "" if none did. Until its next. */
HC_API const char* hc_error(void);
/* The instruction set that floats are computed with here, such as "avx512bf16"; $HETCONV_ISA forces
 * one. NULL where it names none of this machine's. */
HC_API const char* hc_isa(void);

#ifdef __cplusplus
}
#endif
#endif
