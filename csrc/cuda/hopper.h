// SPDX-License-Identifier: Apache-2.0
// The instructions of Hopper that the wide kernel is made of, each as one small function.
//
// They exist in sm_90a machine code only: where HETCONV_WGMMA is not defined, kernels are built
// without a body, and never launched.
//
// What is taken on trust, as no GPU has run them:
//  - an operand's descriptor: PTX ISA, "Strides" and "Canonical Layouts" of wgmma. Without
//  swizzling
//    and K-major, LBO leads from the first eight of sixteen k to the second and SBO from eight rows
//    to the next eight, eight rows are 128 bytes, and they may begin at any multiple of 16 bytes;
//    the base offset, which is about swizzling, is 0.
//  - that the threads of a warpgroup see what copy_async brought once they have waited for the
//    barrier that counts it, and that fence.proxy.async in all of them, between that and wgmma,
//    makes wgmma see it: cp.async writes as threads do (the generic proxy), wgmma reads through the
//    async proxy, and a fence is to lie on the way from the one to the other, in the block of the
//    latter (PTX ISA, "Causality order" and "Async proxy"; Lustig et al., ISCA 2022, section 5.4).
//    Writers cannot fence: they go on while their copies are on their way.
//  - the same of a transposed operand (MN-major, "Interleave"): LBO leads from the first eight of
//    sixteen k to the second, SBO from eight columns to the next eight.
//  - that wgmma, once waited for, has read its operands, so that they may be overwritten in either
//    way after an arrival.
//  - that bytes of a multicast may count at a barrier before its own block expects them.
#pragma once
#include "mbarrier.h"
#ifdef HETCONV_HOST
#include "host_hopper.h"
#else

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HETCONV_WGMMA
#endif

namespace hetconv::cuda {

// Which warp this is, known to be the same in all its lanes.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xFFFFFFFF, int(threadIdx.x) / 32, 0);
}

// The registers of a thread, from here on; all warps of a warpgroup come here.
template <int kCount> __device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A barrier of `threads` threads of the block, those that name it.
__device__ __forceinline__ void barrier_of(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// All lanes of this warp: what they did before comes before what any of them does after it.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Clocks of this multiprocessor.
__device__ __forceinline__ int64_t clocks() { return clock64(); }

// Clusters ---------------------------------------------------------------------------------------

// Which block of its cluster this is.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster, which may come here one by one.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory");
}

// Arrives at the barrier that lies at `address` of another block of the cluster, or of this one. It
// says that wgmma has read a slot, which is all it orders: hence no wider a scope than the default,
// whose fences of all memory at every step would be dear (CUTLASS does the same).
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t address, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(address),
      "r"(rank)
      : "memory");
}

// Copies -----------------------------------------------------------------------------------------

// Copies bytes (a multiple of 16) to shared memory; they count at the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t address, const void* source, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(address),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// The same to each block of the cluster whose bit is set: to that address, counted at that barrier.
__device__ __forceinline__ void copy_bulk_to(uint32_t address, const void* source, uint32_t bytes,
                                             uint32_t barrier, uint32_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(address),
      "l"(source), "r"(bytes), "r"(barrier), "h"(uint16_t(blocks))
      : "memory");
}

// Has the barrier count an arrival of this thread once all its copy_async so far have ended, while
// it goes on. Without .noinc the count would be raised first, and this be no arrival of those that
// mbarrier_init counts.
__device__ __forceinline__ void copy_arrive(uint32_t address) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address) : "memory");
}

// Matrices ---------------------------------------------------------------------------------------

// Writes four 8 x 8 matrices of 16-bit numbers, each transposed: lane 8m + i names where row i of
// matrix m is to be, which is column i of the fragments.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const Quad& q) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(q.v[0]), "r"(q.v[1]), "r"(q.v[2]), "r"(q.v[3])
      : "memory");
}

// Before the first product of registers that were written otherwise.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of products.
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all groups but the last kPending.
template <int kPending> __device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators over this place.
template <int kCount> __device__ __forceinline__ void hold_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d += a * b of a warpgroup, a [64, 16] and b [16, kColumns] described by `operand`. Warp w has the
// rows 16w ... 16w + 15; its lane 4g + t has in d[4n ... 4n + 3] the rows g, g, g + 8, g + 8 by
// columns 8n + 2t and 8n + 2t + 1.
template <class T, int kColumns>
__device__ __forceinline__ void product(float (&d)[kColumns / 2], uint64_t a, uint64_t b);

// The same with a in registers, as of `multiply` in ptx.h for the sixteen rows of a warp, which
// keep their numbers until the product is waited for; and b transposed: eight columns of one k lie
// together, in 16 bytes, and eight k of them follow each other. `operand` has for it from the first
// eight k to the second, and from eight columns to the next.
template <class T, int kColumns>
__device__ __forceinline__ void product_of_registers(float (&d)[kColumns / 2], const Quad& a,
                                                     uint64_t b);

// clang-format off
#define HC_NAMES_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HC_NAMES_32 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HC_NAMES_64 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define HC_NAMES_96 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define HC_NAMES_96_8 "%96, %97, %98, %99, %100, %101, %102, %103"
#define HC_NAMES_96_16 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define HC_HOLD_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define HC_HOLD_32(i) HC_HOLD_8(i), HC_HOLD_8(i + 8), HC_HOLD_8(i + 16), HC_HOLD_8(i + 24)
#define HC_PRODUCT(Type, type, columns, a_name, b_name, names, ...)                              \
  template <>                                                                                   \
  __device__ __forceinline__ void product<Type, columns>(float (&d)[columns / 2], uint64_t a,   \
                                                         uint64_t b) {                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type          \
                 " {" names "}, " a_name ", " b_name ", 1, 1, 1, 0, 0;"                         \
                 : __VA_ARGS__                                                                  \
                 : "l"(a), "l"(b));                                                             \
  }
#define HC_PRODUCTS(Type, type)                                                                  \
  HC_PRODUCT(Type, type, 64, "%32", "%33", HC_NAMES_0, HC_HOLD_32(0))                            \
  HC_PRODUCT(Type, type, 128, "%64", "%65", HC_NAMES_0 ", " HC_NAMES_32, HC_HOLD_32(0),          \
             HC_HOLD_32(32))                                                                     \
  HC_PRODUCT(Type, type, 208, "%104", "%105",                                                    \
             HC_NAMES_0 ", " HC_NAMES_32 ", " HC_NAMES_64 ", " HC_NAMES_96_8, HC_HOLD_32(0),     \
             HC_HOLD_32(32), HC_HOLD_32(64), HC_HOLD_8(96))                                      \
  HC_PRODUCT(Type, type, 224, "%112", "%113",                                                    \
             HC_NAMES_0 ", " HC_NAMES_32 ", " HC_NAMES_64 ", " HC_NAMES_96_16, HC_HOLD_32(0),    \
             HC_HOLD_32(32), HC_HOLD_32(64), HC_HOLD_8(96), HC_HOLD_8(104))                      \
  HC_PRODUCT(Type, type, 256, "%128", "%129",                                                    \
             HC_NAMES_0 ", " HC_NAMES_32 ", " HC_NAMES_64 ", " HC_NAMES_96, HC_HOLD_32(0),       \
             HC_HOLD_32(32), HC_HOLD_32(64), HC_HOLD_32(96))
HC_PRODUCTS(Bfloat, "bf16")
HC_PRODUCTS(Half, "f16")
#undef HC_PRODUCTS
#undef HC_PRODUCT
#define HC_PRODUCT_OF_REGISTERS(Type, type)                                                      \
  template <>                                                                                   \
  __device__ __forceinline__ void product_of_registers<Type, 64>(float (&d)[32], const Quad& a, \
                                                                 uint64_t b) {                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                    \
                 " {" HC_NAMES_0 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                    \
                 : HC_HOLD_32(0)                                                                \
                 : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "l"(b));                 \
  }
HC_PRODUCT_OF_REGISTERS(Bfloat, "bf16")
HC_PRODUCT_OF_REGISTERS(Half, "f16")
#undef HC_PRODUCT_OF_REGISTERS
// clang-format on

// Launches (host) --------------------------------------------------------------------------------

// A launch of blocks in clusters; the attribute must live as long as the configuration.
struct ClusterLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  ClusterLaunch(int64_t blocks, int threads, int64_t shared, int cluster, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

// The blocks of a kernel that the current device holds at once in clusters; 0 if it holds none.
template <class P>
int64_t max_resident_clustered(void (*kernel)(P), int threads, int64_t shared, int cluster) {
  if (allow_shared(kernel, shared)) return 0;
  const ClusterLaunch how(cluster, threads, shared, cluster, nullptr);
  int clusters = 0;
  cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &how.config);
  return int64_t(clusters) * cluster;
}

template <class P>
const char* launch_clustered(void (*kernel)(P), P p, int64_t blocks, int threads, int64_t shared,
                             int cluster, void* stream) {
  if (const char* error = allow_shared(kernel, shared)) return error;
  const ClusterLaunch how(blocks, threads, shared, cluster, stream);
  void* arguments[] = {&p};
  return error_text(
      cudaLaunchKernelExC(&how.config, reinterpret_cast<const void*>(kernel), arguments));
}

}  // namespace hetconv::cuda
#endif

namespace hetconv::cuda {

// Describes an operand in shared memory: from eight rows to the next and from the first eight k to
// the second in units of 16 bytes; without swizzling. Of the address, 18 bits are meant (PTX ISA,
// "matrix-descriptor-encode"): in a cluster the block's rank is above them, and would change
// next_k.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t next_k, uint32_t next_rows) {
  return uint64_t(next_rows) << 32 | (next_k << 16 | (address & 0x3FFFF) >> 4);
}

}  // namespace hetconv::cuda
