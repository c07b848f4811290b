// SPDX-License-Identifier: Apache-2.0
// The C face of saved programs. No exception leaves it.
#include "../include/hetconv.h"

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "../cpu/saved_program.h"

struct hc_program {
  hetconv::SavedProgram saved;
};

namespace {

// Of a fixed size, so that noting an error cannot fail.
thread_local char said[1024] = "";

hc_status failed(hc_status status, const char* what, const char* why) {
  std::snprintf(said, sizeof said, "%s%s", what, why);
  return status;
}

template <class Body> hc_status guarded(const Body& body) {
  try {
    return body();
  } catch (const hetconv::FileError& error) {
    return failed(HC_FILE, "the program cannot be loaded: ", error.what());
  } catch (const std::invalid_argument& error) {
    return failed(HC_ARGUMENT, error.what(), "");
  } catch (const std::bad_alloc&) {
    return failed(HC_MEMORY, "this machine has not enough memory", "");
  } catch (const std::length_error&) {
    return failed(HC_MEMORY, "this machine has not enough memory", "");
  } catch (const std::exception& error) {
    return failed(HC_INTERNAL, error.what(), "");
  } catch (...) { return failed(HC_INTERNAL, "something unknown was thrown", ""); }
}

hc_status refuse_null(const char* function) {
  return failed(HC_ARGUMENT, function, ": received NULL, expected an address");
}

hc_status load(const void* data, size_t size, hc_program** program) {
  *program = new hc_program{hetconv::SavedProgram(data, size)};
  return HC_OK;
}

struct Closed {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

std::vector<char> contents(const char* path) {
  const std::unique_ptr<std::FILE, Closed> file(std::fopen(path, "rb"));
  const auto unreadable = [&] {
    return hetconv::FileError(std::string(path) + " cannot be read (" + std::strerror(errno) + ")");
  };
  if (!file || std::fseek(file.get(), 0, SEEK_END) != 0) throw unreadable();
  const long size = std::ftell(file.get());
  // A folder opens, and is as long as it gets.
  if (size < 0 || size == LONG_MAX || std::fseek(file.get(), 0, SEEK_SET) != 0) throw unreadable();
  std::vector<char> found(static_cast<size_t>(size));
  if (std::fread(found.data(), 1, found.size(), file.get()) != found.size()) throw unreadable();
  return found;
}

hc_status describe(const char* function, const std::vector<hetconv::TensorSpec>* specs, int index,
                   hc_tensor* tensor) {
  if (!specs || !tensor) return refuse_null(function);
  if (index < 0 || size_t(index) >= specs->size()) {
    std::snprintf(said, sizeof said, "%s: received the index %d, expected 0 to %d", function, index,
                  int(specs->size()) - 1);
    return HC_ARGUMENT;
  }
  const hetconv::TensorSpec& spec = (*specs)[size_t(index)];
  *tensor = hc_tensor{};
  tensor->name = spec.name.c_str();
  tensor->dtype = hc_dtype(int(spec.type));
  tensor->axes = int(spec.shape.size());
  for (size_t i = 0; i < spec.shape.size(); ++i) {
    tensor->shape[i] = spec.shape[i];
    tensor->strides[i] = spec.strides[i];
  }
  tensor->bytes = size_t(spec.bytes());
  return HC_OK;
}

}  // namespace

static_assert(HC_MAX_AXES == hetconv::kMostAxes, "one number");
static_assert(HC_INT8 == int(hetconv::Element::s8), "dtypes are numbered alike");

extern "C" {

hc_status hc_load(const char* path, hc_program** program) {
  if (!path || !program) return refuse_null("hc_load");
  *program = nullptr;
  return guarded([&] {
    const std::vector<char> file = contents(path);
    return load(file.data(), file.size(), program);
  });
}

hc_status hc_load_memory(const void* data, size_t size, hc_program** program) {
  if (!data || !program) return refuse_null("hc_load_memory");
  *program = nullptr;
  return guarded([&] { return load(data, size, program); });
}

void hc_free(hc_program* program) { delete program; }

int hc_inputs(const hc_program* program) {
  return program ? int(program->saved.about().inputs.size()) : 0;
}

int hc_outputs(const hc_program* program) {
  return program ? int(program->saved.about().outputs.size()) : 0;
}

hc_status hc_input(const hc_program* program, int index, hc_tensor* tensor) {
  return guarded([&] {
    return describe("hc_input", program ? &program->saved.about().inputs : nullptr, index, tensor);
  });
}

hc_status hc_output(const hc_program* program, int index, hc_tensor* tensor) {
  return guarded([&] {
    return describe("hc_output", program ? &program->saved.about().outputs : nullptr, index,
                    tensor);
  });
}

hc_status hc_run(hc_program* program, const void* const* inputs, void* const* outputs,
                 int threads) {
  if (!program || !inputs || !outputs) return refuse_null("hc_run");
  return guarded([&] {
    program->saved.run(inputs, outputs, threads);
    return HC_OK;
  });
}

size_t hc_release(hc_program* program) {
  size_t freed = 0;
  if (program)
    guarded([&] {
      freed = program->saved.release();
      return HC_OK;
    });
  return freed;
}

const char* hc_error(void) { return said; }

const char* hc_isa(void) {
  const char* name = nullptr;
  guarded([&] {
    name = hetconv::available_isas().front()->name;
    return HC_OK;
  });
  return name;
}

}  // extern "C"
