// SPDX-License-Identifier: Apache-2.0
// Python face of programs: what a call of the engine was, and running many of them as one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <optional>
#include <tuple>
#include <utility>

#include "../names.h"
#include "program.h"
#include "saved_program.h"

namespace py = pybind11;
using namespace hetconv;

namespace {

using StepPointer = std::shared_ptr<Step>;
using PlacePair = std::pair<int, int64_t>;
using BoundStep = std::pair<StepPointer, std::vector<PlacePair>>;

Each each_named(const std::string& name) {
  static const char* const names[] = {"add", "sub", "mul", "relu", "clamp", "leaky_relu"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return Each(i);
  throw std::invalid_argument("'" + name + "' is nothing that a program does to each element");
}

std::unique_ptr<Program> make_program(const std::vector<BoundStep>& steps) {
  auto program = std::make_unique<Program>();
  for (const BoundStep& bound : steps) {
    std::vector<Place> places;
    for (const PlacePair& place : bound.second) places.push_back({place.first, place.second});
    program->add(bound.first, std::move(places));
  }
  return program;
}

StepPointer in_planes(const Step& step, const std::array<bool, 3>& which,
                      const std::array<int64_t, 3>& nhw) {
  return std::const_pointer_cast<Step>(step.in_planes(which, nhw[0], int(nhw[1]), int(nhw[2])));
}

void run_program(const Program& program, const std::vector<uintptr_t>& addresses) {
  if (int(addresses.size()) < program.bases())
    throw std::invalid_argument("a program was given too few addresses");
  py::gil_scoped_release release;
  program.run(reinterpret_cast<char* const*>(addresses.data()));
}

void run_parts(const Program& program, const std::vector<uintptr_t>& addresses,
               const std::vector<int64_t>& strides, int64_t parts, int workers) {
  if (int(addresses.size()) < program.bases() || strides.size() != addresses.size())
    throw std::invalid_argument("a program was given too few addresses or strides");
  py::gil_scoped_release release;
  program.run_parts(reinterpret_cast<char* const*>(addresses.data()), strides.data(), parts,
                    workers);
}

// What a program was made from, to be found unchanged: entries of dictionaries, by identity, and
// tensors, by their storage's address, their implementation and their version.
class Guard {
 public:
  void entry(py::dict of, py::object key) {
    PyObject* value = PyDict_GetItemWithError(of.ptr(), key.ptr());  // borrowed
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    entries_.push_back({std::move(of), std::move(key), py::reinterpret_borrow<py::object>(value)});
  }
  void tensor(py::object tensor, py::object storage) {
    tensors_.push_back({tensor, facts(tensor), std::move(storage)});
  }
  bool holds() const {
    for (const Entry& e : entries_)
      if (PyDict_GetItemWithError(e.of.ptr(), e.key.ptr()) != e.value.ptr()) return false;
    try {
      for (const Watched& w : tensors_)
        if (facts(w.tensor) != w.facts) return false;
    } catch (const py::error_already_set&) {  // an inference tensor, which has no version
      return false;
    }
    return true;
  }

 private:
  using Facts = std::array<int64_t, 3>;
  struct Entry {
    py::dict of;
    py::object key, value;  // value: null where there was none
  };
  struct Watched {
    py::object tensor;
    Facts facts;
    py::object storage;  // kept, so that no other one has its address
  };
  static Facts facts(const py::object& tensor) {
    static const py::str& version = *new py::str("_version");
    static const py::str& implementation = *new py::str("_cdata");
    static const py::str& address = *new py::str("data_ptr");
    return {py::cast<int64_t>(tensor.attr(version)), py::cast<int64_t>(tensor.attr(implementation)),
            py::cast<int64_t>(tensor.attr(address)())};
  }
  std::vector<Entry> entries_;
  std::vector<Watched> tensors_;
};

// name, dtype, shape, strides
using PlainTensor =
    std::tuple<std::string, std::string, std::vector<int64_t>, std::vector<int64_t>>;

std::vector<TensorSpec> tensor_specs(const std::vector<PlainTensor>& tensors) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16", "uint8", "int8"};
  std::vector<TensorSpec> specs;
  for (const auto& [name, dtype, shape, strides] : tensors) {
    const auto at = std::find(std::begin(names), std::end(names), dtype);
    if (at == std::end(names) || shape.size() != strides.size() || shape.size() > kMostAxes)
      throw std::invalid_argument("'" + name + "' is no tensor that a program can be given");
    specs.push_back({name, Element(at - std::begin(names)), shape, strides});
  }
  return specs;
}

// Of a layer: the Support's bits, the address, number and dtype ("int8" too) of its live weights.
using PlainWeights = std::tuple<py::bytes, uintptr_t, int64_t, std::string>;

using PlainPart =
    std::tuple<const Program*, std::vector<std::optional<PlainWeights>>, std::vector<int>>;

py::bytes saved_program(const std::vector<PlainPart>& parts, int64_t arena,
                        const std::vector<PlainTensor>& inputs,
                        const std::vector<PlainTensor>& outputs, const std::string& made_by,
                        const std::string& network) {
  const ProgramFile about{made_by, network, arena, tensor_specs(inputs), tensor_specs(outputs)};
  std::deque<SavedWeights> kept;  // their addresses stay
  std::vector<ProgramPart> made;
  for (const auto& [program, weights, bases] : parts) {
    made.push_back({program, {}, bases});
    for (const auto& given : weights) {
      if (given) {
        const auto& [bits, at, count, dtype] = *given;
        kept.push_back({reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(bits.ptr())),
                        reinterpret_cast<const void*>(at), count,
                        dtype == "int8" ? DType::f32 : dtype_named(dtype)});
      }
      made.back().weights.push_back(given ? &kept.back() : nullptr);
    }
  }
  return py::bytes(write_program(about, made));
}

std::unique_ptr<SavedProgram> read_program(const py::bytes& file) {
  try {
    return std::make_unique<SavedProgram>(PyBytes_AS_STRING(file.ptr()),
                                          size_t(PyBytes_GET_SIZE(file.ptr())));
  } catch (const FileError& error) {
    const py::object kind = py::module_::import("hetconv_kernels.errors").attr("FileError");
    PyErr_SetString(kind.ptr(), error.what());
    throw py::error_already_set();
  }
}

void run_saved(SavedProgram& program, const std::vector<uintptr_t>& inputs,
               const std::vector<uintptr_t>& outputs, int threads) {
  if (inputs.size() != program.about().inputs.size() ||
      outputs.size() != program.about().outputs.size())
    throw std::invalid_argument("a program was given another number of addresses");
  py::gil_scoped_release release;
  program.run(reinterpret_cast<const void* const*>(inputs.data()),
              reinterpret_cast<void* const*>(outputs.data()), threads);
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Step, StepPointer>(m, "Step")
      .def_property_readonly("kind", &Step::kind)
      .def_property_readonly("operands", &Step::operands)
      .def_property_readonly("lying",
                             [](const Step& s) {
                               static const char* const names[] = {"fixed", "planes", "pixels",
                                                                   "either"};
                               return names[int(s.lying())];
                             })
      .def_property_readonly("weight_bytes", &Step::weight_bytes)
      .def(
          "of_part",
          [](const Step& s, int64_t parts) {
            return std::const_pointer_cast<Step>(s.of_part(parts));
          },
          py::arg("parts"))
      .def("in_planes", &in_planes, py::arg("which"), py::arg("nhw"));
  py::class_<Tape>(m, "Tape", "Notes the calls of the engine of the thread that starts it.")
      .def(py::init<>())
      .def("start", &Tape::start)
      .def("stop", &Tape::stop)
      .def("take", [](Tape& tape) {
        std::vector<std::pair<StepPointer, std::vector<uintptr_t>>> noted;
        for (Tape::Noted& one : tape.take())
          noted.emplace_back(std::const_pointer_cast<Step>(one.step), std::move(one.operands));
        return noted;
      });
  py::class_<Program>(m, "Program", "Steps, each with the places (base, offset) of its operands.")
      .def(py::init(&make_program), py::arg("steps"))
      .def_property_readonly("bases", &Program::bases)
      .def_property_readonly("kinds",
                             [](const Program& p) {
                               std::vector<std::string> kinds;
                               for (size_t i = 0; i < p.size(); ++i)
                                 kinds.push_back(p.step(i).kind());
                               return kinds;
                             })
      .def("run", &run_program, py::arg("addresses"))
      .def("run_parts", &run_parts, py::arg("addresses"), py::arg("strides"), py::arg("parts"),
           py::arg("workers"));
  py::class_<Guard>(m, "Guard", "Tells whether what a program was made from is as it was.")
      .def(py::init<>())
      .def("entry", &Guard::entry, py::arg("of"), py::arg("key"))
      .def("tensor", &Guard::tensor, py::arg("tensor"), py::arg("storage"))
      .def("holds", &Guard::holds);

  m.def("saved_program", &saved_program, py::arg("parts"), py::arg("arena"), py::arg("inputs"),
        py::arg("outputs"), py::arg("made_by"), py::arg("network"),
        "Returns the contents of a program's file.");
  py::class_<SavedProgram>(m, "SavedProgram", "A program that was read from a file's contents.")
      .def(py::init(&read_program), py::arg("file"))
      .def_property_readonly("arena", [](const SavedProgram& p) { return p.about().arena; })
      .def("run", &run_saved, py::arg("inputs"), py::arg("outputs"), py::arg("threads") = 0)
      .def("release", &SavedProgram::release);

  m.def(
      "each_step",
      [](const std::string& what, const std::string& dtype, int64_t count, float low, float high,
         int threads) -> StepPointer {
        return std::make_shared<EachStep>(each_named(what), dtype_named(dtype), count, low, high,
                                          threads);
      },
      py::arg("what"), py::arg("dtype"), py::arg("count"), py::arg("low") = 0.0f,
      py::arg("high") = 0.0f, py::arg("threads") = 1);
  m.def(
      "max_pool_step",
      [](const std::string& dtype, const std::array<int64_t, 4>& nhwc, const Pool& q,
         int threads) -> StepPointer {
        for (int i = 1; i < 4; ++i)
          if (nhwc[size_t(i)] > INT32_MAX) throw std::invalid_argument("an image is too large");
        return std::make_shared<PoolStep>(Pooling::max, dtype_named(dtype), nhwc[0], int(nhwc[1]),
                                          int(nhwc[2]), int(nhwc[3]), q, threads);
      },
      py::arg("dtype"), py::arg("nhwc"), py::arg("pool"), py::arg("threads") = 1);
  m.def(
      "average_pool",
      [](const std::string& dtype, uintptr_t x, const std::array<int64_t, 4>& nhwc, uintptr_t y,
         const Pool& q, bool inside, int threads) {
        for (int i = 1; i < 4; ++i)
          if (nhwc[size_t(i)] > INT32_MAX) throw std::invalid_argument("an image is too large");
        const auto step = std::make_shared<PoolStep>(inside ? Pooling::mean_inside : Pooling::mean,
                                                     dtype_named(dtype), nhwc[0], int(nhwc[1]),
                                                     int(nhwc[2]), int(nhwc[3]), q, threads);
        if (Tape* tape = Tape::current()) tape->note(step, {x, y});
        py::gil_scoped_release release;
        char* const operands[] = {reinterpret_cast<char*>(x), reinterpret_cast<char*>(y)};
        step->run(operands, 0);
      },
      py::arg("dtype"), py::arg("x"), py::arg("nhwc"), py::arg("y"), py::arg("pool"),
      py::arg("inside"), py::arg("threads") = 1);
  m.def(
      "copy_step",
      [](int element, const CopyStep::Four& sizes, const CopyStep::Four& x_strides,
         const CopyStep::Four& y_strides, int threads) -> StepPointer {
        return std::make_shared<CopyStep>(element, sizes, x_strides, y_strides, threads);
      },
      py::arg("element"), py::arg("sizes"), py::arg("x_strides"), py::arg("y_strides"),
      py::arg("threads") = 1);
  m.def(
      "pad_step",
      [](int element, const CopyStep::Four& sizes, const CopyStep::Four& x_strides,
         const CopyStep::Four& y_strides, int64_t count, int64_t first, const py::bytes& value,
         int threads) -> StepPointer {
        const std::string bytes = value;
        uint64_t low = 0;
        std::memcpy(&low, bytes.data(), bytes.size() < 8 ? bytes.size() : 8);
        return std::make_shared<PadStep>(CopyStep(element, sizes, x_strides, y_strides, threads),
                                         count, first, low);
      },
      py::arg("element"), py::arg("sizes"), py::arg("x_strides"), py::arg("y_strides"),
      py::arg("count"), py::arg("first"), py::arg("value"), py::arg("threads") = 1);
  m.def(
      "cast_step",
      [](const std::string& from, const std::string& to, int64_t count,
         int threads) -> StepPointer {
        return std::make_shared<CastStep>(dtype_named(from), dtype_named(to), count, threads);
      },
      py::arg("from_dtype"), py::arg("to_dtype"), py::arg("count"), py::arg("threads") = 1);
  m.def(
      "concat_step",
      [](int64_t outer, std::vector<int64_t> sizes, int threads) -> StepPointer {
        return std::make_shared<ConcatStep>(outer, std::move(sizes), threads);
      },
      py::arg("outer"), py::arg("sizes"), py::arg("threads") = 1);
  m.def(
      "pick_step",
      [](int64_t images, int height, int width, int64_t pixel_bytes, std::vector<int> rows,
         std::vector<int> columns, int threads) -> StepPointer {
        return std::make_shared<PickStep>(images, height, width, pixel_bytes, std::move(rows),
                                          std::move(columns), threads);
      },
      py::arg("images"), py::arg("height"), py::arg("width"), py::arg("pixel_bytes"),
      py::arg("rows"), py::arg("columns"), py::arg("threads") = 1);
}
