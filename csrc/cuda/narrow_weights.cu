// SPDX-License-Identifier: Apache-2.0
// Weights on their way in, and their gradients on their way out.
#include "narrow.h"
#include "ptx.h"

namespace hetconv::cuda {
namespace {

constexpr int kThreads = 256;

// Element types of weights: how to read and write one number.
struct Single {};

template <class T> __device__ float read(const void* p, int64_t i) {
  return widen<T>(static_cast<const uint16_t*>(p)[i]);
}
template <> __device__ float read<Single>(const void* p, int64_t i) {
  return static_cast<const float*>(p)[i];
}

template <class T> __device__ void write(void* p, int64_t i, float v) {
  static_cast<uint16_t*>(p)[i] = uint16_t(narrow_pair<T>(v, 0.0f));
}
template <> __device__ void write<Single>(void* p, int64_t i, float v) {
  static_cast<float*>(p)[i] = v;
}

struct Pack {
  const void* w;
  const int32_t* source;
  void* slabs;
  int64_t size;
};

template <class W, class T> __global__ void __launch_bounds__(kThreads) pack_kernel(Pack p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.size) return;
  const int32_t from = load_table(p.source + i);
  write<T>(p.slabs, i, from < 0 ? 0.0f : read<W>(p.w, from));
}

struct Reduce {
  const float* partials;
  const int32_t* targets;
  void* dw;
  int64_t size;
  int32_t splits;
};

template <class T> __global__ void __launch_bounds__(kThreads) reduce_kernel(Reduce p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.size) return;
  const int32_t to = load_table(p.targets + i);
  if (to < 0) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int s = 0; s < p.splits; ++s) sum += p.partials[s * p.size + i];
  write<T>(p.dw, to, sum);
}

template <class T> void (*pack_of(DType w))(Pack) {
  if (w == DType::f32) return pack_kernel<Single, T>;
  if (w == DType::bf16) return pack_kernel<Bfloat, T>;
  return w == DType::f16 ? pack_kernel<Half, T> : nullptr;
}

int64_t blocks_of(int64_t size) { return (size + kThreads - 1) / kThreads; }

}  // namespace

const char* narrow_pack(const void* w, DType w_dtype, const int32_t* source, void* slabs,
                        DType dtype, int64_t size, void* stream) {
  auto* kernel = dtype == DType::bf16  ? pack_of<Bfloat>(w_dtype)
                 : dtype == DType::f16 ? pack_of<Half>(w_dtype)
                 : dtype == DType::f32 ? pack_of<Single>(w_dtype)
                                       : nullptr;
  if (!kernel) return "weights are packed from and to float32, bf16 or fp16";
  if (!size) return nullptr;
  return launch(kernel, Pack{w, source, slabs, size}, blocks_of(size), 1, kThreads, 0, stream);
}

const char* narrow_reduce(const float* partials, const int32_t* targets, void* dw, int64_t size,
                          int64_t dw_size, int32_t splits, DType dtype, void* stream) {
  void (*kernel)(Reduce) = dtype == DType::f32    ? reduce_kernel<Single>
                           : dtype == DType::bf16 ? reduce_kernel<Bfloat>
                           : dtype == DType::f16  ? reduce_kernel<Half>
                                                  : nullptr;
  if (!kernel) return "gradients are float32, bf16 or fp16";
  const int64_t bytes = dw_size * (dtype == DType::f32 ? 4 : 2);
  if (bytes)
    if (const char* error = clear(dw, bytes, stream)) return error;
  if (!size) return nullptr;
  return launch(kernel, Reduce{partials, targets, dw, size, splits}, blocks_of(size), 1, kThreads,
                0, stream);
}

const char* const* narrow_kernels() {
  static const char* const names[] = {"narrow_fprop", "narrow_wgrad", "narrow_pack",
                                      "narrow_reduce", nullptr};
  return names;
}

}  // namespace hetconv::cuda
