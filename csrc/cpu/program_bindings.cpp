// SPDX-License-Identifier: Apache-2.0
// Python face of programs: what a call of the engine was, and running many of them as one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "../names.h"
#include "program.h"

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

void run_program(const Program& program, const std::vector<uintptr_t>& addresses) {
  if (int(addresses.size()) < program.bases())
    throw std::invalid_argument("a program was given too few addresses");
  py::gil_scoped_release release;
  program.run(reinterpret_cast<char* const*>(addresses.data()));
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

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Step, StepPointer>(m, "Step")
      .def_property_readonly("kind", &Step::kind)
      .def_property_readonly("operands", &Step::operands);
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
      .def("run", &run_program, py::arg("addresses"));
  py::class_<Guard>(m, "Guard", "Tells whether what a program was made from is as it was.")
      .def(py::init<>())
      .def("entry", &Guard::entry, py::arg("of"), py::arg("key"))
      .def("tensor", &Guard::tensor, py::arg("tensor"), py::arg("storage"))
      .def("holds", &Guard::holds);

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
      [](const std::string& dtype, const std::array<int64_t, 4>& nhwc, const std::array<int, 8>& v,
         int threads) -> StepPointer {
        for (int i = 1; i < 4; ++i)
          if (nhwc[size_t(i)] > INT32_MAX) throw std::invalid_argument("an image is too large");
        const Pool q{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]};
        return std::make_shared<MaxPoolStep>(dtype_named(dtype), nhwc[0], int(nhwc[1]),
                                             int(nhwc[2]), int(nhwc[3]), q, threads);
      },
      py::arg("dtype"), py::arg("nhwc"), py::arg("pool"), py::arg("threads") = 1);
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
