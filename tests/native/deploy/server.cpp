// SPDX-License-Identifier: Apache-2.0
// A host without Python: loads a saved program, runs it in every way that is allowed and some that
// are not, and compares each result with what Python gave, bit for bit.
//
//   server PROGRAM INPUT... EXPECTED...     files of raw elements
//   server --load PROGRAM                   prints the status and what is said
//   server --time PROGRAM CALLS THREADS     prints the median of the seconds of a call
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "hetconv.h"

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define COUNTS_ALLOCATIONS 1
// All memory of the process comes from here, the library's too. What OpenMP's runtime takes for a
// team is not counted.
static std::atomic<bool> counting(false);
static std::atomic<long> allocations(0);
static void count(void* caller) {
  Dl_info place;
  if (counting && (!dladdr(caller, &place) || !std::strstr(place.dli_fname, "libgomp")))
    ++allocations;
}
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t n) {
  count(__builtin_return_address(0));
  return __libc_malloc(n);
}
void* calloc(size_t n, size_t size) {
  count(__builtin_return_address(0));
  return __libc_calloc(n, size);
}
void* realloc(void* at, size_t n) {
  count(__builtin_return_address(0));
  return __libc_realloc(at, n);
}
void* memalign(size_t to, size_t n) {
  count(__builtin_return_address(0));
  return __libc_memalign(to, n);
}
void* aligned_alloc(size_t to, size_t n) {
  count(__builtin_return_address(0));
  return __libc_memalign(to, n);
}
int posix_memalign(void** at, size_t to, size_t n) {
  count(__builtin_return_address(0));
  *at = __libc_memalign(to, n);
  return *at ? 0 : 12;
}
}
#endif

namespace {

using Bytes = std::vector<char>;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "server: %s\n", what.c_str());
  std::exit(1);
}

void expect(bool right, const std::string& what) {
  if (!right) fail(what + "; hc_error: " + hc_error());
}

Bytes contents(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(std::string("cannot read ") + path);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

long faults() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt + usage.ru_majflt;
}

struct Call {
  explicit Call(const hc_program* program, const std::vector<Bytes>& given) : inputs(given) {
    for (int i = 0; i < hc_outputs(program); ++i) {
      hc_tensor t;
      expect(hc_output(program, i, &t) == HC_OK, "an output has no description");
      outputs.emplace_back(t.bytes);
    }
    for (Bytes& one : inputs) from.push_back(one.data());
    for (Bytes& one : outputs) to.push_back(one.data());
  }
  hc_status run(hc_program* program, int threads) {
    for (Bytes& one : outputs) std::memset(one.data(), 0xff, one.size());
    return hc_run(program, from.data(), to.data(), threads);
  }
  std::vector<Bytes> inputs, outputs;
  std::vector<const void*> from;
  std::vector<void*> to;
};

const char* const kTypes[] = {"float32", "float64", "bfloat16", "float16", "uint8", "int8"};

void print(const char* what, const hc_tensor& t) {
  std::printf("%s %s: %s [", what, t.name, kTypes[t.dtype]);
  for (int i = 0; i < t.axes; ++i) std::printf("%s%lld", i ? ", " : "", (long long)t.shape[i]);
  std::printf("], strides [");
  for (int i = 0; i < t.axes; ++i) std::printf("%s%lld", i ? ", " : "", (long long)t.strides[i]);
  std::printf("], %zu bytes\n", t.bytes);
}

bool says(const char* part) { return std::strstr(hc_error(), part) != nullptr; }

void refuse_mistakes(hc_program* program, const std::vector<Bytes>& inputs) {
  Call call(program, inputs);
  hc_tensor t;
  expect(hc_run(nullptr, call.from.data(), call.to.data(), 1) == HC_ARGUMENT, "no program was run");
  expect(hc_run(program, nullptr, call.to.data(), 1) == HC_ARGUMENT, "it ran without inputs");
  expect(hc_run(program, call.from.data(), nullptr, 1) == HC_ARGUMENT, "it ran without outputs");
  for (int threads : {-1, 100000})
    expect(call.run(program, threads) == HC_ARGUMENT && says("threads"), "it took any threads");
  for (int index : {-1, hc_inputs(program)})
    expect(hc_input(program, index, &t) == HC_ARGUMENT && says("index"), "it took any index");
  expect(hc_output(program, 0, nullptr) == HC_ARGUMENT, "it described into nothing");
  const std::vector<void*> to = call.to;
  call.to[0] = nullptr;
  expect(call.run(program, 1) == HC_ARGUMENT && says("output 0"), "it wrote to nothing");
  call.to[0] = call.inputs[0].data();
  expect(call.run(program, 1) == HC_ARGUMENT && says("overlaps"), "an output was an input");
  call.to = to;
  expect(hc_output(program, 0, &t) == HC_OK, "an output has no description");
  if (t.dtype == HC_FLOAT32) {
    Bytes wide(t.bytes + 8);
    call.to[0] = wide.data() + 1;
    expect(call.run(program, 1) == HC_ARGUMENT && says("multiple of 4"), "it took any address");
    call.to = to;
  }
  if (to.size() > 1) {
    call.to[1] = call.to[0];
    expect(call.run(program, 1) == HC_ARGUMENT && says("overlaps"), "two outputs were one");
    call.to = to;
  }
  expect(call.run(program, 1) == HC_OK, "it did not run after mistakes");
}

void run_steadily(hc_program* program, const std::vector<Bytes>& inputs,
                  const std::vector<Bytes>& expected) {
  Call call(program, inputs);
  for (int i = 0; i < 3; ++i) expect(call.run(program, 1) == HC_OK, "it does not run");
  constexpr int kCalls = 200;
#ifdef COUNTS_ALLOCATIONS
  counting = true;
  delete new std::vector<int>(9);
  if (allocations != 2) fail("allocations are not counted");
  allocations = 0;
#endif
  const long faulted = faults();
  for (int i = 0; i < kCalls; ++i)
    if (call.run(program, 1) != HC_OK) fail("it does not run");
  // An arena of its own for each call would fault on a page each time, at least.
  if (faults() - faulted >= kCalls / 4) fail("steady calls fault on pages");
#ifdef COUNTS_ALLOCATIONS
  counting = false;
  if (allocations != 0) fail("a steady call allocates");
#endif
  if (call.outputs != expected) fail("the last of many calls gave something else");
}

void run_forked(hc_program* program, const std::vector<Bytes>& inputs,
                const std::vector<Bytes>& expected) {
  const pid_t child = fork();
  if (child == 0) {
    Call call(program, inputs);
    _exit(call.run(program, 2) == HC_OK && call.outputs == expected ? 0 : 1);
  }
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
    fail("a forked process computes otherwise");
}

void run_at_once(hc_program* program, const std::vector<Bytes>& inputs,
                 const std::vector<Bytes>& expected) {
  std::atomic<int> wrong(0);
  std::vector<std::thread> callers;
  for (int k = 0; k < 4; ++k)
    callers.emplace_back([&, k] {
      Call call(program, inputs);
      for (int i = 0; i < 10; ++i) {
        if (call.run(program, 1 + (k + i) % 3) != HC_OK || call.outputs != expected) ++wrong;
        if (k == 0 && i == 5) hc_release(program);  // those that nobody is using
      }
    });
  for (std::thread& t : callers) t.join();
  if (wrong) fail("several callers at once: another result");
}

int time_calls(const char* path, int calls, int threads) {
  hc_program* program = nullptr;
  expect(hc_load(path, &program) == HC_OK, "the program was not loaded");
  std::vector<Bytes> inputs;
  for (int i = 0; i < hc_inputs(program); ++i) {
    hc_tensor t;
    expect(hc_input(program, i, &t) == HC_OK, "an input has no description");
    inputs.emplace_back(t.bytes);
  }
  Call call(program, inputs);
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  for (int i = 0; i < calls + calls / 4 + 3; ++i) {
    const auto start = Clock::now();
    if (hc_run(program, call.from.data(), call.to.data(), threads) != HC_OK) fail(hc_error());
    seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  seconds.erase(seconds.begin(), seconds.end() - calls);  // the first ones warm up
  std::sort(seconds.begin(), seconds.end());
  std::printf("%.9f\n", seconds[seconds.size() / 2]);
  hc_free(program);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--load") == 0) {
    hc_program* program = nullptr;
    const hc_status status = hc_load(argv[2], &program);
    std::printf("%d %s\n", int(status), status == HC_OK ? "" : hc_error());
    hc_free(program);
    return 0;
  }
  if (argc == 5 && std::strcmp(argv[1], "--time") == 0)
    return time_calls(argv[2], std::atoi(argv[3]), std::atoi(argv[4]));
  if (argc < 2) fail("no program was named");
  hc_program* program = nullptr;
  expect(hc_load(argv[1], &program) == HC_OK && program, "the program was not loaded");
  const int ins = hc_inputs(program), outs = hc_outputs(program);
  if (argc != 2 + ins + outs) fail("expected a file for each input and output");
  std::vector<Bytes> inputs, expected;
  for (int i = 0; i < ins + outs; ++i) {
    hc_tensor t;
    const bool in = i < ins;
    expect((in ? hc_input(program, i, &t) : hc_output(program, i - ins, &t)) == HC_OK,
           "a tensor has no description");
    print(in ? "input" : "output", t);
    (in ? inputs : expected).push_back(contents(argv[2 + i]));
    if ((in ? inputs : expected).back().size() != t.bytes) fail("a tensor has another size");
  }
  Call call(program, inputs);
  run_forked(program, inputs, expected);  // before there is a team of threads
  for (int threads : {1, 2, 3, 1, 0}) {
    expect(call.run(program, threads) == HC_OK, "it does not run");
    if (call.outputs != expected) fail("another result with " + std::to_string(threads));
  }
  if (call.inputs != inputs) fail("an input was written to");
  run_forked(program, inputs, expected);
  run_at_once(program, inputs, expected);
  refuse_mistakes(program, inputs);
  run_steadily(program, inputs, expected);
  const size_t freed = hc_release(program);
  expect(call.run(program, 1) == HC_OK && call.outputs == expected, "it does not run again");
  const Bytes file = contents(argv[1]);
  hc_program* again = nullptr;
  expect(hc_load_memory(file.data(), file.size(), &again) == HC_OK, "memory was not loaded");
  expect(call.run(again, 1) == HC_OK && call.outputs == expected, "from memory: another result");
  hc_free(again);
  expect(hc_load_memory(file.data(), file.size() - 1, &again) == HC_FILE && !again,
         "a file that was cut was taken");
  std::printf("equal on %s; %zu bytes of arenas were freed\n", hc_isa(), freed);
  hc_free(program);
  hc_free(nullptr);
  return 0;
}
