// SPDX-License-Identifier: Apache-2.0
// Python face of the CUDA engine: addresses and streams as integers. No torch, no numpy.
#ifndef HETCONV_HOST
#include <cuda_runtime_api.h>
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../names.h"
#include "narrow.h"
#include "scattered.h"
#include "wide.h"
#include "wide_wgrad.h"

namespace py = pybind11;
using namespace hetconv;
using namespace hetconv::cuda;

// As a text.
#define HC_TEXT_OF(x) #x
#define HC_TEXT(x) HC_TEXT_OF(x)

// Raises the package's own error for what a launcher says.
static void check(const char* kernel, const char* sentence) {
  if (sentence == nullptr) return;
  const py::object error = py::module_::import("hetconv_kernels.errors").attr("BackendError");
  const std::string message = std::string(kernel) + ": received \"" + sentence +
                              "\" from the CUDA runtime or the launcher, expected a launch. Use "
                              "backend='triton' or 'vendor'.";
  PyErr_SetString(error.ptr(), message.c_str());
  throw py::error_already_set();
}

template <class T> static T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// A field that holds an address.
template <class C, class T>
static void address(py::class_<C>& type, const char* name, T C::* field) {
  type.def_property(
      name, [field](const C& p) { return reinterpret_cast<uintptr_t>(p.*field); },
      [field](C& p, uintptr_t value) { p.*field = reinterpret_cast<T>(value); });
}

#define HC_FIELD(type, Struct, name) type.def_readwrite(#name, &Struct::name)
#define HC_ADDRESS(type, Struct, name) address(type, #name, &Struct::name)

// What all calls have in common: x, and what one block of threads takes.
template <class C>
static void bind_common(py::class_<C>& type, int64_t (*shared_bytes)(const C&),
                        int64_t (*blocks)(const C&, DType)) {
  type.def(py::init([] { return C{}; }));
  HC_FIELD(type, C, x_n);
  HC_FIELD(type, C, x_h);
  HC_FIELD(type, C, x_w);
  HC_FIELD(type, C, batch);
  HC_FIELD(type, C, image_h);
  HC_FIELD(type, C, image_w);
  type.def_property_readonly("shared_bytes", shared_bytes);
  type.def(
      "max_resident_blocks",
      [blocks](const C& p, const std::string& dtype) { return blocks(p, dtype_named(dtype)); },
      py::arg("dtype"));
}

// What the calls of fprop and dgrad have in common: C is Narrow, Wide or Scattered.
template <class C>
static void bind_call(py::class_<C>& type, const char* name, int64_t (*shared_bytes)(const C&),
                      int64_t (*blocks)(const C&, DType),
                      const char* (*start)(const C&, DType, void*)) {
  bind_common(type, shared_bytes, blocks);
  HC_FIELD(type, C, y_n);
  HC_FIELD(type, C, y_h);
  HC_FIELD(type, C, y_w);
  type.def_property(
      "act", [](const C& p) { return int(p.act); },
      [](C& p, const std::string& act) { p.act = act_named(act); });
  type.def(
      "launch",
      [name, start](C p, const std::string& dtype, uintptr_t x, uintptr_t slabs, uintptr_t y,
                    uintptr_t scale, uintptr_t shift, uintptr_t residual, uintptr_t stream) {
        p.x = at<void>(x);
        p.slabs = at<void>(slabs);
        p.y = at<void>(y);
        p.scale = at<float>(scale);
        p.shift = at<float>(shift);
        p.residual = at<void>(residual);
        check(name, start(p, dtype_named(dtype), at<void>(stream)));
      },
      py::arg("dtype"), py::arg("x"), py::arg("slabs"), py::arg("y"), py::arg("scale"),
      py::arg("shift"), py::arg("residual"), py::arg("stream"));
}

// The same of wgrad: C is NarrowWgrad or WideWgrad.
template <class C>
static void bind_gradient(py::class_<C>& type, const char* name, int64_t (*shared_bytes)(const C&),
                          int64_t (*blocks)(const C&, DType),
                          const char* (*start)(const C&, DType, void*)) {
  bind_common(type, shared_bytes, blocks);
  type.def(
      "launch",
      [name, start](C p, const std::string& dtype, uintptr_t x, uintptr_t dy, uintptr_t partials,
                    uintptr_t stream) {
        p.x = at<void>(x);
        p.dy = at<void>(dy);
        p.partials = at<float>(partials);
        check(name, start(p, dtype_named(dtype), at<void>(stream)));
      },
      py::arg("dtype"), py::arg("x"), py::arg("dy"), py::arg("partials"), py::arg("stream"));
}

static void bind_fprop(py::module_& m) {
  py::class_<Narrow> type(m, "Narrow");
  HC_ADDRESS(type, Narrow, classes);
  HC_ADDRESS(type, Narrow, heads);
  HC_ADDRESS(type, Narrow, rounds);
  HC_ADDRESS(type, Narrow, lists);
  HC_ADDRESS(type, Narrow, words);
  HC_ADDRESS(type, Narrow, chunks);
  HC_ADDRESS(type, Narrow, slots);
  HC_ADDRESS(type, Narrow, rows);
  HC_FIELD(type, Narrow, class_count);
  HC_FIELD(type, Narrow, parts);
  HC_FIELD(type, Narrow, round_count);
  HC_FIELD(type, Narrow, tile_h);
  HC_FIELD(type, Narrow, tile_w);
  HC_FIELD(type, Narrow, warps_m);
  HC_FIELD(type, Narrow, warps_n);
  HC_FIELD(type, Narrow, raw_pitch);
  HC_FIELD(type, Narrow, slot_pitch);
  HC_FIELD(type, Narrow, halo_pixels);
  HC_FIELD(type, Narrow, max_words);
  HC_FIELD(type, Narrow, max_fragments);
  HC_FIELD(type, Narrow, vector_stores);
  HC_FIELD(type, Narrow, buffers);
  HC_FIELD(type, Narrow, resident);
  HC_FIELD(type, Narrow, blocks);
  HC_FIELD(type, Narrow, item);
  HC_FIELD(type, Narrow, split);
  HC_FIELD(type, Narrow, channels);
  HC_FIELD(type, Narrow, tma);
  HC_FIELD(type, Narrow, box_h);
  HC_FIELD(type, Narrow, box_w);
  bind_call(type, "narrow_fprop", &narrow_shared_bytes, &narrow_blocks, &narrow_fprop);
}

static void bind_wgrad(py::module_& m) {
  py::class_<NarrowWgrad> type(m, "NarrowWgrad");
  HC_ADDRESS(type, NarrowWgrad, geometry);
  HC_ADDRESS(type, NarrowWgrad, heads);
  HC_ADDRESS(type, NarrowWgrad, units);
  HC_ADDRESS(type, NarrowWgrad, chunks);
  HC_ADDRESS(type, NarrowWgrad, slots);
  HC_FIELD(type, NarrowWgrad, y_n);
  HC_FIELD(type, NarrowWgrad, y_h);
  HC_FIELD(type, NarrowWgrad, y_w);
  HC_FIELD(type, NarrowWgrad, parts);
  HC_FIELD(type, NarrowWgrad, unit_count);
  HC_FIELD(type, NarrowWgrad, tile_h);
  HC_FIELD(type, NarrowWgrad, tile_w);
  HC_FIELD(type, NarrowWgrad, warps);
  HC_FIELD(type, NarrowWgrad, x_pitch);
  HC_FIELD(type, NarrowWgrad, x_slot_pitch);
  HC_FIELD(type, NarrowWgrad, dy_pitch);
  HC_FIELD(type, NarrowWgrad, dy_slot_pitch);
  HC_FIELD(type, NarrowWgrad, halo_pixels);
  HC_FIELD(type, NarrowWgrad, buffers);
  HC_FIELD(type, NarrowWgrad, blocks);
  HC_FIELD(type, NarrowWgrad, tma);
  HC_FIELD(type, NarrowWgrad, channels);
  HC_FIELD(type, NarrowWgrad, filters);
  HC_FIELD(type, NarrowWgrad, dy_h);
  HC_FIELD(type, NarrowWgrad, dy_w);
  HC_FIELD(type, NarrowWgrad, halo_h);
  HC_FIELD(type, NarrowWgrad, halo_w);
  bind_gradient(type, "narrow_wgrad", &narrow_wgrad_shared_bytes, &narrow_wgrad_blocks,
                &narrow_wgrad);
}

static void bind_wide_wgrad(py::module_& m) {
  py::class_<WideWgrad> type(m, "WideWgrad");
  HC_ADDRESS(type, WideWgrad, classes);
  HC_ADDRESS(type, WideWgrad, jobs);
  HC_ADDRESS(type, WideWgrad, blocks);
  HC_ADDRESS(type, WideWgrad, places);
  HC_FIELD(type, WideWgrad, dy_n);
  HC_FIELD(type, WideWgrad, dy_h);
  HC_FIELD(type, WideWgrad, dy_w);
  HC_FIELD(type, WideWgrad, out_h);
  HC_FIELD(type, WideWgrad, out_w);
  HC_FIELD(type, WideWgrad, job_count);
  HC_FIELD(type, WideWgrad, products);
  HC_FIELD(type, WideWgrad, tile_rows);
  HC_FIELD(type, WideWgrad, most_blocks);
  HC_FIELD(type, WideWgrad, x_pitch);
  HC_FIELD(type, WideWgrad, dy_pitch);
  HC_FIELD(type, WideWgrad, stages);
  HC_FIELD(type, WideWgrad, splits);
  bind_gradient(type, "wide_wgrad", &wide_wgrad_shared_bytes, &wide_wgrad_blocks, &wide_wgrad);
}

static void bind_wide(py::module_& m) {
  py::class_<Wide> type(m, "Wide");
  HC_ADDRESS(type, Wide, classes);
  HC_ADDRESS(type, Wide, heads);
  HC_ADDRESS(type, Wide, blocks);
  HC_ADDRESS(type, Wide, steps);
  HC_ADDRESS(type, Wide, rows);
  HC_FIELD(type, Wide, class_count);
  HC_FIELD(type, Wide, pairs);
  HC_FIELD(type, Wide, pixels);
  HC_FIELD(type, Wide, flat_pitch);
  HC_FIELD(type, Wide, plane_pitch);
  HC_FIELD(type, Wide, stages);
  HC_FIELD(type, Wide, slots);
  HC_FIELD(type, Wide, cluster);
  HC_FIELD(type, Wide, grid);
  bind_call(type, "wide_fprop", &wide_shared_bytes, &wide_blocks, &wide_fprop);
}

static void bind_scattered(py::module_& m) {
  py::class_<Scattered> type(m, "Scattered");
  HC_ADDRESS(type, Scattered, parts);
  HC_ADDRESS(type, Scattered, blocks);
  HC_ADDRESS(type, Scattered, segments);
  HC_ADDRESS(type, Scattered, begins);
  HC_ADDRESS(type, Scattered, jobs);
  HC_ADDRESS(type, Scattered, spans);
  HC_ADDRESS(type, Scattered, steps);
  HC_ADDRESS(type, Scattered, columns);
  HC_FIELD(type, Scattered, channels);
  HC_FIELD(type, Scattered, out_h);
  HC_FIELD(type, Scattered, out_w);
  HC_FIELD(type, Scattered, base_h);
  HC_FIELD(type, Scattered, base_w);
  HC_FIELD(type, Scattered, part_count);
  HC_FIELD(type, Scattered, most_blocks);
  HC_FIELD(type, Scattered, side);
  HC_FIELD(type, Scattered, warps);
  HC_FIELD(type, Scattered, pixel_bytes);
  HC_FIELD(type, Scattered, width);
  bind_call(type, "scattered_fprop", &scattered_shared_bytes, &scattered_blocks, &scattered_fprop);
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA engine: built, not measured.";
  bind_fprop(m);
  bind_wgrad(m);
  bind_wide(m);
  bind_wide_wgrad(m);
  bind_scattered(m);
  m.def(
      "reduce",
      [](uintptr_t partials, uintptr_t targets, uintptr_t dw, int64_t size, int64_t dw_size,
         int32_t splits, const std::string& dtype, uintptr_t stream) {
        check("narrow_reduce",
              narrow_reduce(at<float>(partials), at<int32_t>(targets), at<void>(dw), size, dw_size,
                            splits, dtype_named(dtype), at<void>(stream)));
      },
      py::arg("partials"), py::arg("targets"), py::arg("dw"), py::arg("size"), py::arg("dw_size"),
      py::arg("splits"), py::arg("dtype"), py::arg("stream"));
  m.def(
      "pack",
      [](uintptr_t w, const std::string& w_dtype, uintptr_t source, uintptr_t slabs,
         const std::string& dtype, int64_t size, uintptr_t stream) {
        check("narrow_pack",
              narrow_pack(at<void>(w), dtype_named(w_dtype), at<int32_t>(source), at<void>(slabs),
                          dtype_named(dtype), size, at<void>(stream)));
      },
      py::arg("w"), py::arg("w_dtype"), py::arg("source"), py::arg("slabs"), py::arg("dtype"),
      py::arg("size"), py::arg("stream"));
  m.def(
      "wide_rate",
      [](uintptr_t clocks, uintptr_t values, int32_t blocks, int32_t steps, int32_t row_pitch,
         int32_t plane_pitch, int32_t taps, uintptr_t stream) {
        const WideRate p{at<int64_t>(clocks), at<float>(values), blocks, steps,
                         row_pitch,           plane_pitch,       taps};
        check("wide_rate", wide_rate(p, at<void>(stream)));
      },
      py::arg("clocks"), py::arg("values"), py::arg("blocks"), py::arg("steps"),
      py::arg("row_pitch"), py::arg("plane_pitch"), py::arg("taps"), py::arg("stream"));
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const char* const* name = narrow_kernels(); *name != nullptr; ++name)
      names.push_back(*name);
    names.push_back("wide_fprop");
    names.push_back("wide_wgrad");
    names.push_back("scattered_fprop");
    return names;
  });
  m.def("tma_unsupported", [] {
    const char* reason = narrow_tma_unsupported();
    return std::string(reason ? reason : "");
  });
  m.def("architectures", [] { return std::string(HC_TEXT(HETCONV_ARCHITECTURES)); });
#ifndef HETCONV_HOST  // tests run the kernels on the CPU
  // As 13000; the driver's is 0 where there is none.
  m.def("versions", [] {
    int runtime = 0, driver = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    return std::pair<int, int>(runtime, driver);
  });
#endif
}
