// SPDX-License-Identifier: Apache-2.0
// Python face of the engine in 8 bits: addresses as integers; images are dense and channels_last.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "engine.h"
#include "int8_engine.h"
#include "program.h"

namespace py = pybind11;
using namespace hetconv;

namespace {

using Pair = std::array<int, 2>;
using Image = std::array<int64_t, 3>;  // images, height, width

[[noreturn]] void refuse(const std::string& message) {
  const py::object error = py::module_::import("hetconv_kernels.errors").attr("ArgumentError");
  PyErr_SetString(error.ptr(), message.c_str());
  throw py::error_already_set();
}

const uint8_t* bytes_at(uintptr_t at) { return reinterpret_cast<const uint8_t*>(at); }

Byte byte_type(bool is_signed) { return is_signed ? Byte::s8 : Byte::u8; }

Int8Out out_type(const std::string& name) {
  if (name == "uint8") return Int8Out::u8;
  if (name == "int8") return Int8Out::s8;
  if (name == "float32") return Int8Out::f32;
  throw std::invalid_argument("dtype '" + name + "' is not uint8, int8 or float32");
}

int size_of(const char* name, int64_t size) {
  if (size < 0 || size > (1 << 30))
    refuse(std::string(name) + ": received " + std::to_string(size) +
           " pixels, expected 0 to 2**30. Use the backend 'reference'.");
  return int(size);
}

std::shared_ptr<Int8Plan> make_plan(const py::buffer& mask, const std::string& isa,
                                    const std::string& form) {
  const py::buffer_info info = mask.request();
  if (info.ndim != 4 || info.itemsize != 1)
    throw std::invalid_argument("mask must be a C-contiguous one-byte array [F, C, KH, KW]");
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    if (info.shape[i] < 1 || (info.shape[i] > 1 && info.strides[i] != expected) ||
        info.shape[i] > (1 << 30))
      throw std::invalid_argument(
          "mask must be a C-contiguous one-byte array [F, C, KH, KW] without empty axes");
    expected *= info.shape[i];
    if (i == 1 && expected > (1 << 30))
      refuse("weights of a filter: received " + std::to_string(expected) +
             ", expected at most 2**30. Use the backend 'reference'.");
  }
  if (info.shape[2] > kMaxKernel || info.shape[3] > kMaxKernel)
    refuse(
        "kernel: received more than 64 taps along an axis, expected at most 64. Use the backend "
        "'reference'.");
  if (form != "auto" && form != "filters" && form != "pixels")
    throw std::invalid_argument("form '" + form + "' is not auto, filters or pixels");
  const Int8Kernels& kernels = int8_isa_named(isa);
  const auto* data = static_cast<const uint8_t*>(info.ptr);
  py::gil_scoped_release release;
  return std::make_shared<Int8Plan>(data, int(info.shape[0]), int(info.shape[1]),
                                    int(info.shape[2]), int(info.shape[3]), kernels, form);
}

bool run_fprop(const std::shared_ptr<Int8Packed>& packed_, uintptr_t x, bool x_signed, int x_zero,
               const Image& nhw, uintptr_t y, const std::string& dtype, int y_zero, float low,
               float high, const Pair& out, const Pair& stride, const Pair& padding,
               const Pair& dilation, uintptr_t multiplier, uintptr_t bias, uintptr_t residual,
               bool residual_signed, float residual_multiplier, int residual_zero, int threads,
               const std::optional<Pool>& pool) {
  const Int8Packed& packed = *packed_;
  const Int8Lowered& low_ = packed.plan().lowered();
  Int8Problem p{};
  if (stride[0] < 1 || stride[1] < 1 || dilation[0] < 1 || dilation[1] < 1)
    throw std::invalid_argument("stride and dilation must be at least 1");
  p.N = nhw[0];
  p.C = low_.C;
  p.F = low_.F;
  p.H = size_of("height", nhw[1]);
  p.W = size_of("width", nhw[2]);
  p.Ho = size_of("output height", out[0]);
  p.Wo = size_of("output width", out[1]);
  p.sh = stride[0];
  p.sw = stride[1];
  p.pt = size_of("padding", padding[0]);
  p.pl = size_of("padding", padding[1]);
  p.dh = dilation[0];
  p.dw = dilation[1];
  p.x = bytes_at(x);
  p.x_type = byte_type(x_signed);
  p.x_zero = x_zero;
  p.y = reinterpret_cast<void*>(y);
  p.y_type = out_type(dtype);
  p.y_zero = y_zero;
  p.low = low;
  p.high = high;
  p.res = bytes_at(residual);
  p.res_type = byte_type(residual_signed);
  p.res_zero = residual_zero;
  p.res_multiplier = residual_multiplier;
  p.threads = threads;
  if (pool) {
    const Pool& q = *pool;
    if (q.KH < 1 || q.KW < 1 || q.sh < 1 || q.sw < 1 || q.pt < 0 || q.pl < 0 || q.pt >= q.KH ||
        q.pl >= q.KW || (q.Ho - 1) * int64_t(q.sh) - q.pt >= p.Ho ||
        (q.Wo - 1) * int64_t(q.sw) - q.pl >= p.Wo || p.res)
      throw std::invalid_argument("a window of the pooling has no output in it");
  }
  p.pool = pool ? &*pool : nullptr;
  const auto* scales = reinterpret_cast<const float*>(multiplier);
  const auto* shifts = reinterpret_cast<const int32_t*>(bias);
  int64_t bound = 0;
  const int unfit = int8_unfit_filter(packed, scales, shifts, &bound);
  if (unfit >= 0 && bound > 0)
    refuse("sum of |w| * 255 + |bias| of filter " + std::to_string(unfit) + ": received " +
           std::to_string(bound) +
           ", expected less than 2**31. Its int32 accumulator could overflow: keep this layer in "
           "float.");
  if (unfit >= 0)
    refuse("multiplier of filter " + std::to_string(unfit) +
           ": received NaN or Inf, expected a finite number.");
  if (Tape* tape = Tape::current())
    tape->note(std::make_shared<Int8ConvStep>(packed_, p, scales, shifts), {x, residual, y});
  py::gil_scoped_release release;
  return int8_fprop(packed, p, scales, shifts);
}

void run_sum(const Int8Kernels& kernels, int64_t count, uintptr_t a, bool a_signed, int a_zero,
             float a_multiplier, uintptr_t b, bool b_signed, int b_zero, float b_multiplier,
             uintptr_t y, const std::string& dtype, int y_zero, float low, float high,
             int threads) {
  const Int8Sum s{count,
                  bytes_at(a),
                  bytes_at(b),
                  byte_type(a_signed),
                  byte_type(b_signed),
                  a_zero,
                  b_zero,
                  a_multiplier,
                  b_multiplier,
                  reinterpret_cast<void*>(y),
                  out_type(dtype),
                  y_zero,
                  low,
                  high,
                  usable_threads(threads)};
  if (Tape* tape = Tape::current())
    tape->note(std::make_shared<Int8SumStep>(kernels, s), {a, b, y});
  py::gil_scoped_release release;
  kernels.sum(s);
}

Int8Images images(uintptr_t x, bool x_signed, const std::array<int64_t, 4>& nhwc, uintptr_t y,
                  int threads) {
  Int8Images s{};
  s.N = nhwc[0];
  s.H = size_of("height", nhwc[1]);
  s.W = size_of("width", nhwc[2]);
  s.C = size_of("channels", nhwc[3]);
  s.x = bytes_at(x);
  s.x_type = byte_type(x_signed);
  s.y = reinterpret_cast<void*>(y);
  s.threads = usable_threads(threads);
  return s;
}

void run_mean(const Int8Kernels& kernels, uintptr_t x, bool x_signed, int x_zero,
              const std::array<int64_t, 4>& nhwc, float multiplier, uintptr_t y,
              const std::string& dtype, int y_zero, float low, float high, int threads) {
  Int8Images s = images(x, x_signed, nhwc, y, threads);
  s.x_zero = x_zero;
  s.multiplier = multiplier;
  s.y_type = out_type(dtype);
  s.y_zero = y_zero;
  s.low = low;
  s.high = high;
  if (Tape* tape = Tape::current())
    tape->note(std::make_shared<Int8ImagesStep>(kernels, s), {x, y});
  py::gil_scoped_release release;
  kernels.mean(s);
}

void run_max_pool(const Int8Kernels& kernels, uintptr_t x, bool x_signed,
                  const std::array<int64_t, 4>& nhwc, uintptr_t y, int threads, const Pool& pool) {
  Int8Images s = images(x, x_signed, nhwc, y, threads);
  s.pool = &pool;
  if (Tape* tape = Tape::current())
    tape->note(std::make_shared<Int8ImagesStep>(kernels, s), {x, y});
  py::gil_scoped_release release;
  kernels.max_pool(s);
}

}  // namespace

void bind_int8(py::module_& m) {
  m.def(
      "int8_isas",
      [] {
        std::vector<std::string> names;
        for (const Int8Kernels* k : int8_isas()) names.push_back(k->name);
        return names;
      },
      "Returns the instruction sets for 8 bits that this machine can run, best first.");
  py::class_<Int8Block>(m, "Int8Block")
      .def_readonly("lanes", &Int8Block::lanes)
      .def_readonly("filters", &Int8Block::filters)
      .def_readonly("quads", &Int8Block::quads)
      .def_readonly("shuffles", &Int8Block::shuffles)
      .def_readonly("triples", &Int8Block::triples)
      .def_readonly("twins", &Int8Block::twins)
      .def_readonly("order", &Int8Block::order)
      .def_readonly("contiguous", &Int8Block::contiguous)
      .def_readonly("spreads", &Int8Block::spreads,
                    "Vectors of 64 channels that its bytes are permuted into; 0: they are stored "
                    "one by one, or are neighbours.");
  py::class_<Int8Packed, std::shared_ptr<Int8Packed>>(m, "Int8Packed")
      .def_property_readonly("bytes", &Int8Packed::bytes)
      .def("fprop", &run_fprop, py::arg("x"), py::arg("x_signed"), py::arg("x_zero"),
           py::arg("nhw"), py::arg("y"), py::arg("dtype"), py::arg("y_zero"), py::arg("low"),
           py::arg("high"), py::arg("out"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("multiplier"), py::arg("bias"), py::arg("residual"),
           py::arg("residual_signed"), py::arg("residual_multiplier"), py::arg("residual_zero"),
           py::arg("threads"), py::arg("pool"));
  py::class_<Int8Plan, std::shared_ptr<Int8Plan>>(m, "Int8Plan")
      .def(py::init(&make_plan), py::arg("mask"), py::arg("isa") = "", py::arg("form") = "auto")
      .def_property_readonly("form", &Int8Plan::form)
      .def_property_readonly("isa", [](const Int8Plan& p) { return p.kernels().name; })
      .def_property_readonly("live", &Int8Plan::live)
      .def_property_readonly("cost", &Int8Plan::cost)
      .def_property_readonly("useful", &Int8Plan::useful)
      .def_property_readonly("blocks",
                             [](const Int8Plan& p) {
                               const Int8Lowered& l = p.lowered();
                               return std::vector<Int8Block>(l.block, l.block + l.blocks);
                             })
      .def(
          "pack",
          [](std::shared_ptr<Int8Plan> plan, uintptr_t w, const std::array<int64_t, 4>& strides,
             int threads) {
            const auto* weight = reinterpret_cast<const int8_t*>(w);
            py::gil_scoped_release release;
            return std::make_shared<Int8Packed>(std::move(plan), weight, strides.data(), threads);
          },
          py::arg("weight"), py::arg("strides"), py::arg("threads") = 1);
  py::class_<Int8Kernels>(m, "Int8Kernels")
      .def_property_readonly("isa", [](const Int8Kernels& k) { return k.name; })
      .def("sum", &run_sum, py::arg("count"), py::arg("a"), py::arg("a_signed"), py::arg("a_zero"),
           py::arg("a_multiplier"), py::arg("b"), py::arg("b_signed"), py::arg("b_zero"),
           py::arg("b_multiplier"), py::arg("y"), py::arg("dtype"), py::arg("y_zero"),
           py::arg("low"), py::arg("high"), py::arg("threads"))
      .def("mean", &run_mean, py::arg("x"), py::arg("x_signed"), py::arg("x_zero"), py::arg("nhwc"),
           py::arg("multiplier"), py::arg("y"), py::arg("dtype"), py::arg("y_zero"), py::arg("low"),
           py::arg("high"), py::arg("threads"))
      .def("max_pool", &run_max_pool, py::arg("x"), py::arg("x_signed"), py::arg("nhwc"),
           py::arg("y"), py::arg("threads"), py::arg("pool"))
      .def(
          "quantize",
          [](const Int8Kernels& k, uintptr_t x, int64_t count, float scale, int zero,
             bool is_signed, uintptr_t y, int threads) {
            if (Tape* tape = Tape::current())
              tape->note(std::make_shared<QuantizeStep>(k, count, scale, zero, byte_type(is_signed),
                                                        threads),
                         {x, y});
            py::gil_scoped_release release;
            k.quantize(reinterpret_cast<const float*>(x), count, scale, zero, byte_type(is_signed),
                       reinterpret_cast<uint8_t*>(y), usable_threads(threads));
          },
          py::arg("x"), py::arg("count"), py::arg("scale"), py::arg("zero"), py::arg("signed"),
          py::arg("y"), py::arg("threads"));
  m.def(
      "int8_kernels",
      [](const std::string& isa) -> const Int8Kernels& { return int8_isa_named(isa); },
      py::arg("isa") = "", py::return_value_policy::reference);
}
