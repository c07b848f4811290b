// SPDX-License-Identifier: Apache-2.0
// What GPUs from Hopper on have for copies that one thread asks for: mbarriers, which count
// arrivals and bytes, and TMA, each as one small function.
//
// They exist in machine code for compute capability 9.0 and later: where HETCONV_BULK is not
// defined, kernels that need them are built without a body, and never launched.
//
// What is taken on trust, as no GPU has run them:
//  - that a box lies dense in shared memory, channels first, then columns, rows and images; that
//    what is outside of the tensor, at negative coordinates too, is zeros there, and that those
//    count as bytes at the barrier (PTX ISA, "Tiled mode" and "Out-of-bound access");
//  - that fence.proxy.async of each thread that wrote, then __syncthreads, orders those writes
//    before a box that one thread asks for afterwards; and that reads need no fence;
//  - that after fence.mbarrier_init copies that the same thread asks for count at the barrier;
//  - the call of the driver that encodes a tensor map, but for the values that it is given.
#pragma once
#include "ptx.h"
#ifdef HETCONV_HOST
#include "host_mbarrier.h"
#else
#include <cuda.h>  // types only: the driver itself is found at run time

#include <cstdio>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HETCONV_BULK
#endif

namespace hetconv::cuda {

// mbarriers: of arrivals and bytes ---------------------------------------------------------------

// A phase ends after `count` arrivals and all bytes that are expected in it.
__device__ __forceinline__ void mbarrier_init(uint32_t address, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
}

// Makes inits visible to the copying engine and to the cluster.
__device__ __forceinline__ void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}

// Arrives, and has the phase wait for that many bytes more.
__device__ __forceinline__ void mbarrier_expect(uint32_t address, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
}

#ifdef HETCONV_CHECKED
// Nanoseconds after which a wait is taken never to end.
constexpr uint64_t kLongestWait = 2'000'000'000;

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
#endif

// Waits for the end of the phase of that parity; the one before the first counts as odd and ended.
// try_wait may itself wait for some time, so it is no way to look and do something else meanwhile.
//
// `first` is the address of the block's first barrier. With HETCONV_CHECKED a wait that lasts
// longer than any kernel ends the launch with an error, and says at which barrier, counted from
// that one: otherwise a wait that never ends looks like a GPU that hangs.
__device__ __forceinline__ void mbarrier_wait(uint32_t address, uint32_t parity,
                                              [[maybe_unused]] uint32_t first) {
  uint32_t ended;
#ifdef HETCONV_CHECKED
  const uint64_t begin = nanoseconds();
#endif
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended)
        : "r"(address), "r"(parity)
        : "memory");
#ifdef HETCONV_CHECKED
    if (!ended && nanoseconds() - begin > kLongestWait) {
      printf("hetconv: block %d, thread %d: barrier %u waits for the end of a phase of parity %u\n",
             int(blockIdx.x), int(threadIdx.x), (address - first) / 8, parity);
      __trap();
    }
#endif
  } while (!ended);
}

// Orders what this thread did or waited for in shared memory before what wgmma and bulk copies,
// which see it another way, do after it.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Boxes ------------------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// The block's own shared memory; for ::cluster, which every release of nvcc takes, machine code for
// sm_120 writes to local memory before each copy.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define HC_OWN_SHARED "shared::cta"
#else
#define HC_OWN_SHARED "shared::cluster"
#endif

// Copies a box of a tensor of four dimensions to shared memory, at a multiple of 128 bytes; all its
// bytes count at the barrier. The map is a parameter of the kernel.
__device__ __forceinline__ void tma_load(uint32_t address, const TensorMap* map, int channel,
                                         int col, int row, int image, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.4d." HC_OWN_SHARED
               ".global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(address),
               "l"(map), "r"(channel), "r"(col), "r"(row), "r"(image), "r"(barrier)
               : "memory");
}

// Launches (host) --------------------------------------------------------------------------------

// The compute capability of the current device, as 90.
inline int capability() {
  int device = 0, found[2] = {};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&found[0], cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&found[1], cudaDevAttrComputeCapabilityMinor, device);
  return found[0] * 10 + found[1];
}

// The version of CUDA that the driver is of, as 13010.
inline int driver_version() {
  int found = 0;
  cudaDriverGetVersion(&found);
  return found;
}

// What encodes a tensor map, asked of the driver once; null if it has none.
using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);
inline TensorMapEncoder tensor_map_encoder() {
  static const TensorMapEncoder found = [] {
    void* function = nullptr;
    auto status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &status);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &status);
#endif
    const bool is = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    if (!is) cudaGetLastError();  // it is no error of what follows
    return is ? reinterpret_cast<TensorMapEncoder>(function) : nullptr;
  }();
  return found;
}

// Gives this thread the context of the current device: a thread that no call of the runtime has
// reached yet has none, and the driver wants one.
inline bool bind_context() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
}

// A launch of a kernel with bulk copies, which the host's kernels are watched for.
template <class P>
const char* launch_bulk(void (*kernel)(P), const P& p, int64_t blocks_x, int64_t blocks_y,
                        int threads, int64_t shared, void* stream) {
  return launch(kernel, p, blocks_x, blocks_y, threads, shared, stream);
}

}  // namespace hetconv::cuda
#endif
