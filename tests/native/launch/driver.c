// SPDX-License-Identifier: Apache-2.0
// A stand-in for the CUDA driver, which does nothing and keeps what it is asked: Triton's launcher
// and ours run on it as on a machine with a GPU, up to the driver's own work.
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

enum { kMost = 256, kMap = 128 };

// What the latest launch was given: sizes of its parameters are told beforehand, as the driver
// knows them from the kernel.
int64_t kept_sizes[kMost];
int kept_count, kept_launches, kept_encodings, kept_refusals;
int kept_version = 13000;
unsigned char kept_params[kMost][kMap];
Config kept_config;
uint64_t kept_function;

int cuLaunchKernelEx(const Config *config, void *function, void **params, void **extra) {
  (void)extra;
  if (kept_refusals > 0) return --kept_refusals, 201;  // no context
  kept_config = *config;
  kept_function = (uint64_t)function;
  ++kept_launches;
  for (int i = 0; i < kept_count; ++i) memcpy(kept_params[i], params[i], (size_t)kept_sizes[i]);
  return 0;
}

// What an encoded descriptor is made of, in an order of its own.
int cuTensorMapEncodeTiled(unsigned char *map, int type, uint32_t rank, void *address,
                           const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *steps, int interleave, int swizzle, int promotion,
                           int fill) {
  if (rank < 1 || rank > 5 || (uint64_t)map % 64 || (uint64_t)address % 16) return 1;
  ++kept_encodings;
  uint32_t words[kMap / 4] = {0};
  memcpy(words, &address, 8);
  words[2] = (uint32_t)type | rank << 8 | (uint32_t)interleave << 12 | (uint32_t)swizzle << 16 |
             (uint32_t)promotion << 20 | (uint32_t)fill << 24;
  for (uint32_t i = 0; i < rank; ++i) {
    words[3 + i] = (uint32_t)sizes[i];
    if (i + 1 < rank) words[8 + i] = (uint32_t)strides[i];
    words[13 + i] = box[i];
    words[18 + i] = steps[i];
  }
  memcpy(map, words, kMap);
  return 0;
}

int cuPointerGetAttribute(void *found, int what, uint64_t pointer) {
  (void)what;
  memcpy(found, &pointer, 8);
  return 0;
}

int cuDeviceGetAttribute(int *found, int what, int device) {
  (void)device;
  // Compute capability 9.0, and memory enough for each block.
  *found = what == 75 ? 9 : what == 76 ? 0 : what == 16 ? 132 : what == 10 ? 32 : 232448;
  return 0;
}

int cuFuncGetAttribute(int *found, int what, void *function) {
  (void)function;
  *found = what == 0 ? 1024 : 0;  // threads that a block may have; registers, spills
  return 0;
}

static int handle(void **found) {
  static int made;
  *found = &made;
  return 0;
}

int cuInit(unsigned flags) { return (int)(flags & 0); }
int cuDeviceGetCount(int *found) { return *found = 1, 0; }
int cuDeviceGet(int *found, int which) { return *found = which, 0; }
int cuCtxGetDevice(int *found) { return *found = 0; }
int cuCtxGetCurrent(void **found) { return handle(found); }
int cuDevicePrimaryCtxRetain(void **found, int device) { return (void)device, handle(found); }
int cuModuleLoadData(void **found, const void *data) { return (void)data, handle(found); }
int cuModuleGetFunction(void **found, void *module, const char *name) {
  return (void)module, (void)name, handle(found);
}
int cuGetErrorString(int code, const char **text) {
  (void)code;
  return *text = "the stand-in refuses", 0;
}
int cuStreamIsCapturing(void *stream, int *found) { return (void)stream, *found = 0; }
int cuDriverGetVersion(int *found) { return *found = kept_version, 0; }
#define NOTHING(name)                                                                              \
  int name() { return 0; }
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuCtxGetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuPointerGetAttributes)
NOTHING(cuTensorMapEncodeIm2col)
