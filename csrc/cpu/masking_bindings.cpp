// SPDX-License-Identifier: Apache-2.0
// Python face of masking.h: addresses as integers.
#include <pybind11/pybind11.h>

#include "masking.h"

namespace py = pybind11;
using namespace hetconv;

namespace {
template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }
}  // namespace

void bind_masking(py::module_& m) {
  m.def(
      "mask_weights",
      [](uintptr_t w, uintptr_t live, uintptr_t y, int64_t count, int size, int threads) {
        py::gil_scoped_release release;
        mask_weights(at<const void>(w), at<const uint8_t>(live), at<void>(y), count, size, threads);
      },
      "Copies elements of some bytes that a byte each says exist, and zeros for the others.");
  m.def(
      "transpose_weights",
      [](uintptr_t w, uintptr_t live, uintptr_t y, int64_t F, int64_t C, int64_t taps, int size,
         int threads) {
        py::gil_scoped_release release;
        transpose_weights(at<const void>(w), at<const uint8_t>(live), at<void>(y), F, C, taps, size,
                          threads);
      },
      "The same of filters [C, taps], written as [taps, C], the order of the bytes too.");
  m.def(
      "multiply_masked",
      [](uintptr_t w, uintptr_t bits, uintptr_t x, uintptr_t bias, uintptr_t y, int64_t rows,
         int64_t F, int64_t C, int threads) {
        const MaskedProduct p{at<const void>(w),
                              at<const uint8_t>(bits),
                              at<const void>(x),
                              at<const void>(bias),
                              at<float>(y),
                              rows,
                              F,
                              C};
        py::gil_scoped_release release;
        multiply_masked(p, threads);
      },
      "Multiplies rows of float32 by a matrix of which bits say which entries exist.");
  m.def(
      "sum_images",
      [](uintptr_t w, uintptr_t live, uintptr_t image, uintptr_t y, int64_t F, int64_t C,
         int64_t images, int64_t taps, bool transposed, int threads) {
        const MaskedImages p{at<const void>(w),
                             at<const uint8_t>(live),
                             at<const float>(image),
                             at<float>(y),
                             F,
                             C,
                             images,
                             taps,
                             transposed};
        py::gil_scoped_release release;
        sum_images(p, threads);
      },
      "Sums images of float32, scaled by coefficients that a byte each says exist.");
}
