// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/cuda/ptx.h with the same meaning on the CPU, for tests (see machine.h).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::hetconv::host::block->current().thread)
#define blockIdx (::hetconv::host::block_index)
#define gridDim (::hetconv::host::grid_size)
#define blockDim (::hetconv::host::block_size)

namespace hetconv::cuda {

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

inline int anew(int v) { return v; }
inline uint32_t shared_begin() { return host::block->begin(); }

inline uint32_t load_shared32(uint32_t address) {
  uint32_t v;
  host::block->read(address, &v, 4);
  return v;
}
inline uint32_t load_shared16(uint32_t address) {
  uint16_t v;
  host::block->read(address, &v, 2);
  return v;
}
inline Pair load_shared64(uint32_t address) {
  Pair v;
  host::block->read(address, &v, 8);
  return v;
}
inline Quad load_shared128(uint32_t address) {
  Quad v;
  host::block->read(address, &v, 16);
  return v;
}
inline void store_shared16(uint32_t address, uint32_t v) {
  const uint16_t narrow = uint16_t(v);
  host::block->write(address, &narrow, 2);
}
inline void store_shared32(uint32_t address, uint32_t v) { host::block->write(address, &v, 4); }
inline void store_shared128(uint32_t address, const Quad& q) {
  host::block->write(address, &q, 16);
}

inline void copy_async(uint32_t address, const void* source, bool valid) {
  host::block->copy(address, valid ? source : nullptr);
}
inline void copy_commit() { host::block->commit(); }
template <int kPending> void copy_wait() { host::block->wait(kPending); }
inline void barrier() { host::block->barrier(); }

// Matrices ---------------------------------------------------------------------------------------

inline void load_all(host::Block& block, host::Warp& warp, bool transposed) {
  uint16_t rows[4][8][8];
  const int first = int(block.current().thread.x) / 32 * 32;
  for (int lane = 0; lane < 32; ++lane)
    block.read_as(first + lane, warp.lanes[lane].address, rows[lane / 8][lane % 8], 16);
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = transposed ? rows[m][t][g] : rows[m][g][t];
      const uint32_t high = transposed ? rows[m][t + 1][g] : rows[m][g][t + 1];
      warp.lanes[lane].result[m] = low | high << 16;
    }
}

inline Quad loaded(const char* name, uint32_t address, void (*all)(host::Block&, host::Warp&)) {
  host::LaneArguments own;
  own.address = address;
  if (host::mistake.name == "wrong-address" && host::mistake.at-- == 0) own.address += 1 << 20;
  const host::LaneArguments& back = host::block->together(name, own, all);
  return {{back.result[0], back.result[1], back.result[2], back.result[3]}};
}
inline Quad load_matrices(uint32_t address) {
  return loaded("load_matrices", address,
                [](host::Block& b, host::Warp& w) { load_all(b, w, false); });
}
inline Quad load_matrices_transposed(uint32_t address) {
  return loaded("load_matrices_transposed", address,
                [](host::Block& b, host::Warp& w) { load_all(b, w, true); });
}

inline void transpose_all(host::Block&, host::Warp& warp) {
  uint16_t rows[8][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int h = 0; h < 2; ++h)
      rows[lane / 4][lane % 4 * 2 + h] = uint16_t(warp.lanes[lane].a[0] >> h * 16);
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, col = lane % 4 * 2;
    warp.lanes[lane].result[0] = rows[col][row] | uint32_t(rows[col + 1][row]) << 16;
  }
}
inline uint32_t transpose_matrix(uint32_t v) {
  host::LaneArguments own;
  own.a[0] = v;
  return host::block->together("transpose_matrix", own, transpose_all).result[0];
}

// Numbers ----------------------------------------------------------------------------------------

inline float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t as_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

// To the nearest of ten bits beside the leading one; ties away from zero.
inline uint32_t nearest_tf32(uint32_t v) {
  return std::isfinite(as_float(v)) ? (v + 0x1000) & ~0x1FFFu : v;
}
inline uint32_t round_tf32(uint32_t v) {
  if (host::mistake.name == "skip-rounding" && host::mistake.at-- == 0) return v;
  return nearest_tf32(v);
}

template <class T> float widen(uint32_t bits);
template <> inline float widen<Bfloat>(uint32_t bits) { return as_float(bits << 16); }
template <> inline float widen<Half>(uint32_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(mantissa), -24);
  return sign * std::ldexp(float(1024 + mantissa), exponent - 25);
}

template <class T> uint16_t rounded(float v);
template <> inline uint16_t rounded<Bfloat>(float v) {
  const uint32_t bits = as_bits(v);
  if (std::isnan(v)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <> inline uint16_t rounded<Half>(float v) {
  const uint16_t sign = as_bits(v) >> 31 ? 0x8000 : 0;
  const float size = std::fabs(v);
  if (std::isnan(v)) return 0x7FFF;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = exponent - 11 > -24 ? exponent - 11 : -24;
  const int whole = int(std::nearbyint(std::ldexp(size, -unit)));
  // Numbers below 2^-14 have the exponent 0 and no hidden bit; the sum carries over where due.
  return sign | uint16_t(unit == -24 ? whole : ((unit + 24) << 10) + whole);
}
template <class T> uint32_t narrow_pair(float first, float second) {
  return rounded<T>(first) | uint32_t(rounded<T>(second)) << 16;
}

template <class T, class Pick> uint32_t picked_pair(uint32_t a, uint32_t b, Pick pick) {
  uint32_t found = 0;
  for (int half = 0; half < 32; half += 16) {
    const uint32_t bits[2] = {a >> half & 0xFFFF, b >> half & 0xFFFF};
    const float v[2] = {widen<T>(bits[0]), widen<T>(bits[1])};
    const bool nan = std::isnan(v[0]) || std::isnan(v[1]);
    found |= (nan ? 0x7FFFu : bits[pick(v[0], v[1]) ? 0 : 1]) << half;
  }
  return found;
}
template <class T> uint32_t greater_pair(uint32_t a, uint32_t b) {
  return picked_pair<T>(a, b, [](float x, float y) { return x > y; });
}
template <class T> uint32_t lesser_pair(uint32_t a, uint32_t b) {
  return picked_pair<T>(a, b, [](float x, float y) { return x < y; });
}

template <class T> void multiply_all(host::Block&, host::Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    const host::LaneArguments& own = warp.lanes[lane];
    for (int i = 0; i < 4; ++i)
      for (int h = 0; h < 2; ++h)
        a[g + i % 2 * 8][t + i / 2 * 8 + h] = widen<T>(own.a[i] >> h * 16 & 0xFFFF);
    for (int i = 0; i < 2; ++i)
      for (int h = 0; h < 2; ++h) b[t + i * 8 + h][g] = widen<T>(own.b[i] >> h * 16 & 0xFFFF);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      warp.lanes[lane].c[i] += sum;
    }
}

template <> inline void multiply_all<Tf32>(host::Block&, host::Warp& warp) {
  float a[16][8], b[8][8];
  const auto number = [](uint32_t bits) {
    if (nearest_tf32(bits) != bits)
      host::fail("%08x, which is no TF32, is multiplied as one", bits);
    return as_float(bits);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const host::LaneArguments& own = warp.lanes[lane];
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = number(own.a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = number(own.b[i]);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][col];
      warp.lanes[lane].c[i] += sum;
    }
}

template <class T> void multiply(float (&c)[4], const Quad& a, uint32_t b0, uint32_t b1) {
  host::LaneArguments own;
  std::memcpy(own.a, a.v, sizeof own.a);
  own.b[0] = b0;
  own.b[1] = b1;
  std::memcpy(own.c, c, sizeof own.c);
  std::memcpy(c, host::block->together("multiply", own, multiply_all<T>).c, sizeof own.c);
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

// Device memory ----------------------------------------------------------------------------------

inline void check_aligned(const void* p, unsigned bytes) {
  if (uintptr_t(p) % bytes) host::fail("%u bytes of device memory at %p, not aligned", bytes, p);
}
inline int32_t load_table(const int32_t* p) { return *p; }
inline Quad load_table128(const void* p) {
  check_aligned(p, 16);
  return *static_cast<const Quad*>(p);
}
inline Pair load_table64(const void* p) {
  check_aligned(p, 8);
  return *static_cast<const Pair*>(p);
}
inline void store128(void* p, const Quad& q) {
  check_aligned(p, 16);
  *static_cast<Quad*>(p) = q;
}
inline void store128(void* p, const float (&v)[4]) {
  check_aligned(p, 16);
  std::memcpy(static_cast<float*>(p), v, 16);
}

// Launches ---------------------------------------------------------------------------------------

template <class P> int64_t max_resident_blocks(void (*kernel)(P), int, int64_t) {
  return kernel ? 3 : 0;
}

template <class P>
const char* launch(void (*kernel)(P), P p, int64_t blocks_x, int64_t blocks_y, int threads,
                   int64_t shared, void*) {
  host::grid_size = {unsigned(blocks_x), unsigned(blocks_y), 1};
  host::block_size = {unsigned(threads), 1, 1};
  for (unsigned y = 0; y < blocks_y; ++y)
    for (unsigned x = 0; x < blocks_x; ++x) {
      host::Block own(threads, shared, {x, y, 0});
      host::run({&own}, host::seed + x + 31 * y, [&] { kernel(p); });
    }
  return nullptr;
}

inline const char* clear(void* p, int64_t bytes, void*) {
  std::memset(p, 0, size_t(bytes));
  return nullptr;
}

}  // namespace hetconv::cuda
