// SPDX-License-Identifier: Apache-2.0
// Python face of the engine: addresses as integers, strides in elements. No torch, no numpy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "../names.h"
#include "dgrad.h"
#include "program.h"
#include "wgrad.h"

namespace py = pybind11;
using namespace hetconv;

using Pair = std::array<int, 2>;
using Strides = std::array<int64_t, 4>;

// Raises the package's own error for what a user can cause.
[[noreturn]] static void refuse(const std::string& message) {
  const py::object error = py::module_::import("hetconv_kernels.errors").attr("ArgumentError");
  PyErr_SetString(error.ptr(), message.c_str());
  throw py::error_already_set();
}

static uintptr_t checked(const char* name, uintptr_t at, DType dtype) {
  const size_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  if (at % size != 0)
    refuse(std::string(name) + ": received an address that is not a multiple of its elements' " +
           std::to_string(size) + " bytes, expected an aligned tensor. Copy it (.clone()).");
  return at;
}

static View view(const char* name, uintptr_t at, const Strides& s, DType dtype) {
  return View{reinterpret_cast<char*>(checked(name, at, dtype)), s[0], s[1], s[2], s[3]};
}

static WeightView weight_view(uintptr_t at, const Strides& s, DType dtype) {
  return WeightView{reinterpret_cast<const char*>(checked("weight", at, dtype)), s[0], s[1], s[2],
                    s[3]};
}

static int pixels(const char* name, int64_t size) {
  if (size < 0 || size > INT32_MAX)
    refuse(std::string(name) + ": received " + std::to_string(size) +
           " pixels, expected 0 to 2**31 - 1. Use another backend, such as 'vendor'.");
  return int(size);
}

struct MaskView {
  const uint8_t* data;
  int F, C, KH, KW;
};

static MaskView mask_view(const py::buffer_info& info) {
  if (info.ndim != 4 || info.itemsize != 1)
    throw std::invalid_argument("mask must be a C-contiguous one-byte array [F, C, KH, KW]");
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    if (info.shape[i] < 1 || (info.shape[i] > 1 && info.strides[i] != expected) ||
        info.shape[i] > (1 << 30))
      throw std::invalid_argument(
          "mask must be a C-contiguous one-byte array [F, C, KH, KW] without empty axes");
    expected *= info.shape[i];
  }
  if (info.shape[2] > kMaxKernel || info.shape[3] > kMaxKernel)
    throw std::invalid_argument("kernels above 64 taps per axis are not supported");
  return MaskView{static_cast<const uint8_t*>(info.ptr), int(info.shape[0]), int(info.shape[1]),
                  int(info.shape[2]), int(info.shape[3])};
}

static void check_form(const std::string& form) {
  if (!is_form(form))
    throw std::invalid_argument("form '" + form +
                                "' is not auto, filters, pixels, columns, winograd 2x2, winograd "
                                "3x3, winograd 4x4 or pixel pairs");
}

static void check_steps(const Pair& stride, const Pair& dilation) {
  if (stride[0] < 1 || stride[1] < 1 || dilation[0] < 1 || dilation[1] < 1)
    throw std::invalid_argument("stride and dilation must be at least 1");
}

static std::shared_ptr<Plan> make_plan(const py::buffer& mask, const std::string& dtype,
                                       const std::string& isa, const std::string& form,
                                       bool channels_last) {
  const py::buffer_info info = mask.request();
  const MaskView m = mask_view(info);
  check_form(form);
  const DType type = dtype_named(dtype);
  const Kernels& kernels = isa_named(isa);
  py::gil_scoped_release release;
  return std::make_shared<Plan>(m.data, m.F, m.C, m.KH, m.KW, type, kernels, form, channels_last);
}

static std::unique_ptr<Dgrad> make_dgrad(const py::buffer& mask, const Pair& stride,
                                         const Pair& padding, const Pair& dilation,
                                         const std::string& dtype, const std::string& isa,
                                         const std::string& form, bool channels_last) {
  const py::buffer_info info = mask.request();
  const MaskView m = mask_view(info);
  check_form(form);
  check_steps(stride, dilation);
  const DType type = dtype_named(dtype);
  const Kernels& kernels = isa_named(isa);
  py::gil_scoped_release release;
  return std::make_unique<Dgrad>(m.data, m.F, m.C, m.KH, m.KW, type, kernels, form, channels_last,
                                 stride.data(), padding.data(), dilation.data());
}

using PackedList = std::vector<std::unique_ptr<Packed>>;
struct PackedParts {
  explicit PackedParts(PackedList&& list) : parts(std::move(list)) {}
  PackedParts(PackedParts&&) = default;
  PackedParts(const PackedParts&) = delete;
  PackedList parts;
  size_t bytes() const {
    size_t total = 0;
    for (const auto& p : parts) total += p->bytes();
    return total;
  }
};

static Problem layer(const Lowered& low, const std::array<int64_t, 3>& nhw, const Pair& out,
                     const Pair& stride, const Pair& padding, const Pair& dilation, int threads) {
  check_steps(stride, dilation);
  Problem p{};
  p.N = nhw[0];
  p.C = low.C;
  p.F = low.F;
  p.KH = low.KH;
  p.KW = low.KW;
  p.H = pixels("height", nhw[1]);
  p.W = pixels("width", nhw[2]);
  p.Ho = out[0];
  p.Wo = out[1];
  p.sh = stride[0];
  p.sw = stride[1];
  p.pt = padding[0];
  p.pl = padding[1];
  p.dh = dilation[0];
  p.dw = dilation[1];
  p.threads = threads;
  return p;
}

// Every window must have an output in it.
static void check_pool(const Pool& q, const Problem& p) {
  const bool steps = q.sh > 0 && q.sw > 0 && q.Ho >= 0 && q.Wo >= 0;
  const bool starts = q.pt >= 0 && q.pl >= 0 && q.pt < q.KH && q.pl < q.KW;
  const bool ends =
      (q.Ho - 1) * int64_t(q.sh) - q.pt < p.Ho && (q.Wo - 1) * int64_t(q.sw) - q.pl < p.Wo;
  if (!steps || !starts || !ends)
    throw std::invalid_argument("a window of the pooling has no output in it");
}

static bool run_fprop(const std::shared_ptr<Plan>& plan_, const std::shared_ptr<Packed>& packed,
                      uintptr_t x, const Strides& xs, const std::array<int64_t, 3>& nhw,
                      uintptr_t y, const Strides& ys, const Pair& out, const Pair& stride,
                      const Pair& padding, const Pair& dilation, uintptr_t scale, uintptr_t shift,
                      uintptr_t residual, const Strides& rs, const std::string& act, int threads,
                      const std::optional<Pool>& pool) {
  const Plan& plan = *plan_;
  Problem p = layer(plan.lowered(), nhw, out, stride, padding, dilation, threads);
  const DType dtype = plan.dtype(), wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  p.x = view("x", x, xs, dtype);
  p.y = view("y", y, ys, dtype);
  p.res = view("residual", residual, rs, dtype);
  p.scale = reinterpret_cast<const void*>(checked("scale", scale, wide));
  p.shift = reinterpret_cast<const void*>(checked("shift", shift, wide));
  p.act = act_named(act);
  if (pool) check_pool(*pool, p);
  p.pool = pool ? &*pool : nullptr;
  if (Tape* tape = Tape::current())
    tape->note(std::make_shared<ConvStep>(plan_, packed, p), {x, residual, y});
  py::gil_scoped_release release;
  return fprop(plan, *packed, p);
}

static std::unique_ptr<Wgrad> make_wgrad(const py::buffer& mask, const std::string& dtype,
                                         const std::string& isa, const std::string& form,
                                         bool channels_last) {
  const py::buffer_info info = mask.request();
  const MaskView m = mask_view(info);
  if (form != "auto" && form != "pixels" && form != "channels")
    throw std::invalid_argument("form '" + form + "' is not auto, pixels or channels");
  const DType type = dtype_named(dtype);
  const Kernels& kernels = isa_named(isa);
  py::gil_scoped_release release;
  return std::make_unique<Wgrad>(m.data, m.F, m.C, m.KH, m.KW, type, kernels, form, channels_last);
}

static void run_wgrad(const Wgrad& w, uintptr_t x, const Strides& xs,
                      const std::array<int64_t, 3>& nhw, uintptr_t dy, const Strides& ys,
                      const Pair& out, uintptr_t dw, const Strides& ws, const Pair& stride,
                      const Pair& padding, const Pair& dilation, int threads) {
  Problem p = layer(w.plan().lowered(), nhw, out, stride, padding, dilation, threads);
  const DType dtype = w.plan().dtype();
  p.x = view("x", x, xs, dtype);
  p.y = view("dy", dy, ys, dtype);
  checked("dw", dw, dtype);
  py::gil_scoped_release release;
  w.run(p, reinterpret_cast<void*>(dw), ws.data());
}

void bind_int8(py::module_& m);     // int8_bindings.cpp
void bind_masking(py::module_& m);  // masking_bindings.cpp
void bind_program(py::module_& m);  // program_bindings.cpp

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU engine: convolutions whose filters read only the columns of a Support.";
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Kernels* k : available_isas()) names.push_back(k->name);
        return names;
      },
      "Returns the instruction sets this machine can run, best first; $HETCONV_ISA forces one.");
  m.def("non_temporal_bytes", non_temporal_bytes,
        "Returns the size beyond which outputs are written past the caches: that of the last one.");
  m.def("set_non_temporal_bytes", set_non_temporal_bytes, py::arg("more_than"),
        "Sets that size, for all threads.");

  py::class_<Pool>(m, "Pool").def(
      py::init([](const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& out) {
        return Pool{kernel[0],  kernel[1],  stride[0], stride[1],
                    padding[0], padding[1], out[0],    out[1]};
      }),
      py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("out"),
      "Windows, and the height and width of what they give.");
  py::class_<Packed, std::shared_ptr<Packed>>(m, "Packed")
      .def_property_readonly("bytes", &Packed::bytes);
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init(&make_plan), py::arg("mask"), py::arg("dtype") = "float32", py::arg("isa") = "",
           py::arg("form") = "auto", py::arg("channels_last") = true)
      .def_property_readonly("half_vectors", [](const Plan& p) { return p.kernels().half_vectors; })
      .def_property_readonly("form", &Plan::form)
      .def_property_readonly("isa", [](const Plan& p) { return p.kernels().name; })
      .def_property_readonly("live", &Plan::live)
      .def_property_readonly("packed_elements", [](const Plan& p) { return p.lowered().packed; })
      .def_property_readonly("cost", &Plan::cost)
      .def_property_readonly("winograd_cost", &Plan::winograd_cost)
      .def_property_readonly("useful", &Plan::useful)
      .def_property_readonly(
          "layouts", [](const Plan& p) { return offsets_count(p.offsets()); },
          "Layouts of bands of which it keeps offsets.")
      .def(
          "pack",
          [](const Plan& p, uintptr_t w, const Strides& s, const std::string& dtype, int threads) {
            const DType from = dtype_named(dtype);
            const WeightView weight = weight_view(w, s, from);
            py::gil_scoped_release release;
            return std::make_shared<Packed>(p, weight, from, threads);
          },
          py::arg("weight"), py::arg("strides"), py::arg("dtype"), py::arg("threads") = 1)
      .def("fprop", &run_fprop, py::arg("packed"), py::arg("x"), py::arg("x_strides"),
           py::arg("nhw"), py::arg("y"), py::arg("y_strides"), py::arg("out"), py::arg("stride"),
           py::arg("padding"), py::arg("dilation"), py::arg("scale") = 0, py::arg("shift") = 0,
           py::arg("residual") = 0, py::arg("residual_strides") = Strides{},
           py::arg("act") = "none", py::arg("threads") = 1, py::arg("pool") = py::none());

  py::class_<Wgrad>(m, "Wgrad")
      .def(py::init(&make_wgrad), py::arg("mask"), py::arg("dtype") = "float32",
           py::arg("isa") = "", py::arg("form") = "auto", py::arg("channels_last") = true)
      .def_property_readonly("form", &Wgrad::form)
      .def_property_readonly("isa", [](const Wgrad& w) { return w.plan().kernels().name; })
      .def_property_readonly("cost", &Wgrad::cost)
      .def_property_readonly("useful", [](const Wgrad& w) { return w.plan().useful(); })
      .def("wgrad", &run_wgrad, py::arg("x"), py::arg("x_strides"), py::arg("nhw"), py::arg("dy"),
           py::arg("dy_strides"), py::arg("out"), py::arg("dw"), py::arg("dw_strides"),
           py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("threads") = 1);

  py::class_<PackedParts>(m, "PackedParts").def_property_readonly("bytes", &PackedParts::bytes);
  py::class_<Dgrad>(m, "Dgrad")
      .def(py::init(&make_dgrad), py::arg("mask"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("dtype") = "float32", py::arg("isa") = "",
           py::arg("form") = "auto", py::arg("channels_last") = true)
      .def_property_readonly("forms",
                             [](const Dgrad& d) {
                               std::vector<std::string> names;
                               for (const Dgrad::Part& p : d.parts())
                                 names.push_back(p.plan->form());
                               return names;
                             })
      .def(
          "pack",
          [](const Dgrad& d, uintptr_t w, const Strides& s, const std::string& dtype, int threads) {
            const DType from = dtype_named(dtype);
            const WeightView weight = weight_view(w, s, from);
            py::gil_scoped_release release;
            return PackedParts(d.pack(weight, from, threads));
          },
          py::arg("weight"), py::arg("strides"), py::arg("dtype"), py::arg("threads") = 1)
      .def(
          "dgrad",
          [](const Dgrad& d, const PackedParts& packed, uintptr_t dy, const Strides& ys,
             const std::array<int64_t, 3>& nhw, uintptr_t dx, const Strides& xs, const Pair& in,
             int threads) {
            const View from = view("dy", dy, ys, d.dtype()), to = view("dx", dx, xs, d.dtype());
            const int height = pixels("height", nhw[1]), width = pixels("width", nhw[2]);
            py::gil_scoped_release release;
            d.run(packed.parts, from, nhw[0], height, width, to, in[0], in[1], threads);
          },
          py::arg("packed"), py::arg("dy"), py::arg("dy_strides"), py::arg("nhw"), py::arg("dx"),
          py::arg("dx_strides"), py::arg("size"), py::arg("threads") = 1);
  bind_int8(m);
  bind_masking(m);
  bind_program(m);
}
