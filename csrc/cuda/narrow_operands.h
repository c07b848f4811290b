// SPDX-License-Identifier: Apache-2.0
// Element types: what a warp multiplies of them, and how two of them lie in shared memory.
#pragma once
#include "ptx.h"

namespace hetconv::cuda {

// Bytes of a number of x and y.
template <class T> constexpr int kItem = 2;
template <> constexpr int kItem<Tf32> = 4;
template <> constexpr int kItem<Tf32x3> = 4;

// Rows of a product as they were loaded. A step's columns are 32 bytes of a pixel, whatever the
// type: sixteen numbers of 16 bits, or eight of float32.
template <class T> struct Operand {
  Quad a;
  __device__ explicit Operand(const Quad& loaded) : a(loaded) {}
  __device__ void multiply_by(float (&c)[4], uint32_t b0, uint32_t b1) const {
    multiply<T>(c, a, b0, b1);
  }
};

// float32 rounded to TF32, as PyTorch does where its user allows it.
template <> struct Operand<Tf32> {
  Quad a;
  __device__ explicit Operand(const Quad& loaded) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.v[i] = round_tf32(loaded.v[i]);
  }
  __device__ void multiply_by(float (&c)[4], uint32_t b0, uint32_t b1) const {
    multiply<Tf32>(c, a, round_tf32(b0), round_tf32(b1));
  }
};

// What is left of a float32 beside its TF32: with that, 22 bits of 24.
__device__ __forceinline__ uint32_t rest_tf32(uint32_t v, uint32_t rounded) {
  return round_tf32(as_bits(as_float(v) - as_float(rounded)));
}

// float32 as the sum of two such numbers (3xTF32): of their four products the least is left out.
template <> struct Operand<Tf32x3> {
  Quad a, rest;
  __device__ explicit Operand(const Quad& loaded) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a.v[i] = round_tf32(loaded.v[i]);
      rest.v[i] = rest_tf32(loaded.v[i], a.v[i]);
    }
  }
  __device__ void multiply_by(float (&c)[4], uint32_t b0, uint32_t b1) const {
    const uint32_t large0 = round_tf32(b0), large1 = round_tf32(b1);
    multiply<Tf32>(c, rest, large0, large1);
    multiply<Tf32>(c, a, rest_tf32(b0, large0), rest_tf32(b1, large1));
    multiply<Tf32>(c, a, large0, large1);
  }
};

// A number in shared memory, as bits.
template <class T> __device__ __forceinline__ uint32_t load_cell(uint32_t address) {
  if constexpr (kItem<T> == 4) return load_shared32(address);
  return load_shared16(address);
}
template <class T> __device__ __forceinline__ void store_cell(uint32_t address, uint32_t bits) {
  if constexpr (kItem<T> == 4)
    store_shared32(address, bits);
  else
    store_shared16(address, bits);
}

// Where the results of two filters lie in shared memory; the second one may be none.
template <class T> struct Cells {
  uint32_t first, last;
  bool second, together;

  __device__ Cells(uint32_t first, uint32_t last, bool second)
      : first(first),
        last(last),
        second(second),
        together(kItem<T> == 2 && last == first + 2 && first % 4 == 0) {}

  // Adds what is there, to numbers whose place is `row` bytes further.
  __device__ void add_to(float (&v)[2], uint32_t row) const {
    if constexpr (kItem<T> == 4) {
      v[0] += as_float(load_shared32(row + first));
      if (second) v[1] += as_float(load_shared32(row + last));
    } else {
      uint32_t old;
      if (together)
        old = load_shared32(row + first);
      else
        old = load_shared16(row + first) | (second ? load_shared16(row + last) << 16 : 0);
      v[0] += widen<T>(old & 0xFFFF);
      v[1] += widen<T>(old >> 16);
    }
  }
  // Writes what an activation makes of two numbers.
  template <class Activation>
  __device__ void store(const Activation& activate, const float (&v)[2], uint32_t row) const {
    if constexpr (kItem<T> == 4) {
      store_shared32(row + first, as_bits(activate.of(v[0])));
      if (second) store_shared32(row + last, as_bits(activate.of(v[1])));
    } else {
      const uint32_t made = activate.template pair<T>(v[0], v[1]);
      if (together) {
        store_shared32(row + first, made);
      } else {
        store_shared16(row + first, made & 0xFFFF);
        if (second) store_shared16(row + last, made >> 16);
      }
    }
  }
};

}  // namespace hetconv::cuda
