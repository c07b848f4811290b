// SPDX-License-Identifier: Apache-2.0
// The instructions that the narrow kernels are made of, each as one small function, and launches.
//
// Shared memory is touched through these functions only, by 32-bit address. So a test can compile
// the kernels for the CPU: with HETCONV_HOST defined, host_ptx.h gives every function the same
// meaning there, checked for bounds, races and values that nobody wrote.
#pragma once
#ifdef HETCONV_HOST
#include "host_ptx.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace hetconv::cuda {

// The element types, by tag; of float32 there are two, see narrow_operands.h.
struct Bfloat {};
struct Half {};
struct Tf32 {};
struct Tf32x3 {};

struct Quad {
  uint32_t v[4];
};
struct Pair {
  uint32_t v[2];
};

// The same number; what is computed from it is computed here and now, not kept in registers from
// where it was before.
__device__ __forceinline__ int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Shared memory ---------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_begin() {
  extern __shared__ __align__(128) char shared_memory[];
  return uint32_t(__cvta_generic_to_shared(shared_memory));
}

__device__ __forceinline__ uint32_t load_shared32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint32_t load_shared16(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ Pair load_shared64(uint32_t address) {
  Pair p;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(p.v[0]), "=r"(p.v[1])
               : "r"(address)
               : "memory");
  return p;
}

__device__ __forceinline__ Quad load_shared128(uint32_t address) {
  Quad q;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3])
               : "r"(address)
               : "memory");
  return q;
}

__device__ __forceinline__ void store_shared16(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(uint16_t(v)) : "memory");
}

__device__ __forceinline__ void store_shared32(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

__device__ __forceinline__ void store_shared128(uint32_t address, const Quad& q) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(q.v[0]), "r"(q.v[1]),
               "r"(q.v[2]), "r"(q.v[3])
               : "memory");
}

// Copies 16 bytes to shared memory while the program goes on; zeros where `valid` is false, and
// the source is then not read.
__device__ __forceinline__ void copy_async(uint32_t address, const void* source, bool valid) {
  const uint32_t bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source),
               "r"(bytes)
               : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's copies, but those of the last kPending groups.
template <int kPending> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void barrier() { __syncthreads(); }

// Matrices ---------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit numbers; lane l has the address of row l % 8 of matrix l / 8, and
// gets the numbers 2 * (l % 4) and the next one of row l / 4 of each.
__device__ __forceinline__ Quad load_matrices(uint32_t address) {
  Quad q;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3])
               : "r"(address)
               : "memory");
  return q;
}

// The same, each matrix transposed.
__device__ __forceinline__ Quad load_matrices_transposed(uint32_t address) {
  Quad q;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3])
               : "r"(address)
               : "memory");
  return q;
}

// An 8x8 matrix of 16-bit numbers, transposed. Lane l has the numbers 2 * (l % 4) and the next one
// of row l / 4, before and afterwards.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t v) {
  uint32_t made;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(made) : "r"(v));
  return made;
}

// c += a * b with a [16, 16], b [16, 8]. Lane 4g + t has in c the rows g and g + 8, columns 2t and
// 2t + 1; in a rows g, g + 8, g, g + 8 by columns 2t, 2t, 2t + 8, 2t + 8 and the next ones; in b
// rows 2t and 2t + 8 and the next ones of column g.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const Quad& a, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply<Bfloat>(float (&c)[4], const Quad& a, uint32_t b0,
                                                 uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply<Half>(float (&c)[4], const Quad& a, uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}

// The same of float32 rounded to TF32, a [16, 8] and b [8, 8]: lane 4g + t has in a rows g, g + 8,
// g, g + 8 by columns t, t, t + 4, t + 4; in b rows t and t + 4 of column g. So matrices of 16 bits
// whose lines are numbers of 32 bits are loaded as they are.
template <>
__device__ __forceinline__ void multiply<Tf32>(float (&c)[4], const Quad& a, uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}

// Numbers ----------------------------------------------------------------------------------------

// The bits of a float32 as a number, and back.
__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float v) { return __float_as_uint(v); }

// A float32 rounded to TF32, to the nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_tf32(uint32_t v) {
  uint32_t made;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(made) : "f"(as_float(v)));
  return made;
}

// Two numbers rounded to 16 bits, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t narrow_pair(float first, float second);

template <> __device__ __forceinline__ uint32_t narrow_pair<Bfloat>(float first, float second) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
  return v;
}

template <> __device__ __forceinline__ uint32_t narrow_pair<Half>(float first, float second) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
  return v;
}

// The number in the low 16 bits.
template <class T> __device__ __forceinline__ float widen(uint32_t bits);

template <> __device__ __forceinline__ float widen<Bfloat>(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

template <> __device__ __forceinline__ float widen<Half>(uint32_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(uint16_t(bits)));
  return v;
}

// Of two pairs of 16-bit numbers the greater and the lesser of each place; NaN where either is.
template <class T> __device__ __forceinline__ uint32_t greater_pair(uint32_t a, uint32_t b);
template <class T> __device__ __forceinline__ uint32_t lesser_pair(uint32_t a, uint32_t b);
#define HC_PAIRS(Type, type)                                                                   \
  template <> __device__ __forceinline__ uint32_t greater_pair<Type>(uint32_t a, uint32_t b) { \
    uint32_t v;                                                                                \
    asm("max.NaN." type " %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));                            \
    return v;                                                                                  \
  }                                                                                            \
  template <> __device__ __forceinline__ uint32_t lesser_pair<Type>(uint32_t a, uint32_t b) {  \
    uint32_t v;                                                                                \
    asm("min.NaN." type " %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));                            \
    return v;                                                                                  \
  }
HC_PAIRS(Bfloat, "bf16x2")
HC_PAIRS(Half, "f16x2")
#undef HC_PAIRS

__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// Device memory ----------------------------------------------------------------------------------

// What no kernel in flight writes.
__device__ __forceinline__ int32_t load_table(const int32_t* p) { return __ldg(p); }

__device__ __forceinline__ Quad load_table128(const void* p) {
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(p));
  return {{q.x, q.y, q.z, q.w}};
}

__device__ __forceinline__ Pair load_table64(const void* p) {
  const uint2 q = __ldg(reinterpret_cast<const uint2*>(p));
  return {{q.x, q.y}};
}

__device__ __forceinline__ void store128(void* p, const Quad& q) {
  *reinterpret_cast<uint4*>(p) = make_uint4(q.v[0], q.v[1], q.v[2], q.v[3]);
}

__device__ __forceinline__ void store128(void* p, const float (&v)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}

// Launches (host) --------------------------------------------------------------------------------

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Lets a kernel have that much dynamic shared memory; more than 48 KiB must be asked for, which is
// done once for each kernel and device.
template <class P> const char* allow_shared(void (*kernel)(P), int64_t shared) {
  if (shared <= 48 * 1024) return nullptr;
  static std::mutex mutex;
  static std::map<std::pair<void (*)(P), int>, int64_t> allowed;
  int device = 0;
  if (const char* error = error_text(cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& most = allowed[{kernel, device}];
  if (shared <= most) return nullptr;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess) most = shared;
  return error_text(error);
}

// The occupancy of a kernel: thread blocks that the current device holds at once; 0 if none, or if
// there is no kernel.
template <class P> int64_t max_resident_blocks(void (*kernel)(P), int threads, int64_t shared) {
  int device = 0, processors = 0, each = 0;
  if (!kernel || allow_shared(kernel, shared)) return 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, reinterpret_cast<const void*>(kernel),
                                                threads, size_t(shared));
  return int64_t(each) * processors;
}

template <class P>
const char* launch(void (*kernel)(P), P p, int64_t blocks_x, int64_t blocks_y, int threads,
                   int64_t shared, void* stream) {
  if (const char* error = allow_shared(kernel, shared)) return error;
  void* arguments[] = {&p};
  return error_text(cudaLaunchKernel(
      reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks_x), unsigned(blocks_y)),
      dim3(unsigned(threads)), arguments, size_t(shared), static_cast<cudaStream_t>(stream)));
}

inline const char* clear(void* p, int64_t bytes, void* stream) {
  return error_text(cudaMemsetAsync(p, 0, size_t(bytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace hetconv::cuda
#endif
