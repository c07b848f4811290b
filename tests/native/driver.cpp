// SPDX-License-Identifier: Apache-2.0
// The engine without Python: a seeded fuzz for the sanitizers. Prints what it ran; the exit status
// is 1 when a result was wrong.
//
//   driver [--cases N] [--seed S] [--isa NAME]   fuzz, calls from several threads at once, of one
//                                              instruction set, or of saved "programs"
//   driver --workspace [--isa NAME]              the memory that calls of many sizes work in
//   driver --mistake NAME                        see mistakes.cpp
#include "driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#if defined(__has_feature)
#define HAS_FEATURE(x) __has_feature(x)
#else
#define HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || \
    HAS_FEATURE(address_sanitizer) || HAS_FEATURE(thread_sanitizer)
#include <sanitizer/common_interface_defs.h>
#define HAS_DEATH_CALLBACK 1
#endif

using namespace driver;

static char running[600];  // printed when a sanitizer ends the process

static void note(const Case& c) {
  std::snprintf(running, sizeof running, "%s", c.describe().c_str());
}

static std::unique_ptr<hetconv::Plan> plan_of(const Case& c, const std::string& form) {
  const Conv& v = c.conv;
  return std::make_unique<hetconv::Plan>(v.mask.data(), v.F, v.C, v.KH, v.KW, c.dtype, *c.isa, form,
                                         c.channels_last);
}

static std::unique_ptr<hetconv::Wgrad> wgrad_of(const Case& c) {
  const Conv& v = c.conv;
  const char* forms[] = {"auto", "pixels", "channels"};
  return std::make_unique<hetconv::Wgrad>(v.mask.data(), v.F, v.C, v.KH, v.KW, c.dtype, *c.isa,
                                          forms[c.seed % 3], c.channels_last);
}

static std::string check(const Case& c, const hetconv::Plan& plan, const hetconv::Wgrad& wgrad) {
  std::string wrong = check_fprop(c, plan);
  if (wrong.empty()) wrong = check_dgrad(c);
  if (wrong.empty()) wrong = check_wgrad(c, wgrad);
  return wrong;
}

static int report(const Case& c, const std::string& wrong) {
  if (wrong.empty()) return 0;
  std::printf("WRONG %s\n      %s\n", wrong.c_str(), c.describe().c_str());
  std::fflush(stdout);
  return 1;
}

static int fuzz(const hetconv::Kernels& isa, uint64_t seed, int cases) {
  int wrong = 0;
  for (int i = 0; i < cases && wrong < 5; ++i) {
    const Case c = random_case(seed + uint64_t(i), isa);
    note(c);
    wrong += report(c, check(c, *plan_of(c, c.form), *wgrad_of(c)));
  }
  return wrong;
}

// Several callers with the same plan and images of their own, as threads of Python are.
static int callers(const hetconv::Kernels& isa, uint64_t seed, int cases) {
  int wrong = 0;
  for (int i = 0; i < cases && wrong == 0; ++i) {
    const Case c = random_case(seed + uint64_t(i), isa);
    note(c);
    const auto plan = plan_of(c, c.form);
    const auto wgrad = wgrad_of(c);
    std::vector<Case> images;
    for (int k = 0; k < 4; ++k) images.push_back(another_image(c, c.seed * 4 + uint64_t(k)));
    std::vector<std::string> said(images.size());
    std::vector<std::thread> threads;
    for (size_t k = 0; k < images.size(); ++k)
      threads.emplace_back([&, k] { said[k] = check(images[k], *plan, *wgrad); });
    for (std::thread& t : threads) t.join();
    for (size_t k = 0; k < images.size(); ++k) wrong += report(images[k], said[k]);
  }
  return wrong;
}

// In 8 bits; every tenth layer is called by several threads at once.
static int fuzz_int8(const hetconv::Int8Kernels& isa, uint64_t seed, int cases) {
  int wrong = 0;
  for (int i = 0; i < cases && wrong < 5; ++i) {
    const Case c = random_case(seed + uint64_t(i), *hetconv::available_isas()[0]);
    note(c);
    std::vector<std::string> said(i % 10 ? 1 : 3);
    std::vector<std::thread> others;
    for (size_t k = 1; k < said.size(); ++k)
      others.emplace_back([&, k] { said[k] = check_int8(c, isa); });
    said[0] = check_int8(c, isa);
    for (std::thread& t : others) t.join();
    for (const std::string& s : said) wrong += report(c, s);
  }
  return wrong;
}

// Files are of the best instruction set here, or of the one that $HETCONV_ISA names.
static int fuzz_programs(uint64_t seed, int cases) {
  int wrong = 0;
  for (int i = 0; i < cases && wrong < 5; ++i) {
    const Case c = random_case(seed + uint64_t(i), *hetconv::available_isas()[0]);
    note(c);
    wrong += report(c, check_program(c));
  }
  return wrong;
}

int main(int argc, char** argv) {
  int cases = 500;
  uint64_t seed = 1;
  std::string isa, mistake;
  bool workspaces = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (option == "--workspace") {
      workspaces = true;
      continue;
    }
    ++i;
    if (option == "--cases")
      cases = std::atoi(value);
    else if (option == "--seed")
      seed = std::strtoull(value, nullptr, 10);
    else if (option == "--isa")
      isa = value;
    else if (option == "--mistake")
      mistake = value;
    else {
      std::fprintf(stderr, "unknown option %s\n", option.c_str());
      return 2;
    }
  }
  if (!mistake.empty()) return make_mistake(mistake);
#ifdef HAS_DEATH_CALLBACK
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "while running %s\n", running); });
#endif
  int wrong = 0;
  for (const hetconv::Kernels* k : hetconv::available_isas()) {
    if (!isa.empty() && isa != k->name) continue;
    int found = 0;
    if (workspaces) {
      found = check_workspaces(*k);
    } else {
      found = fuzz(*k, seed, cases) + callers(*k, seed + 1000003, cases / 20);
      std::printf("%s: %d cases, %d with four callers at once, %d wrong\n", k->name, cases,
                  cases / 20, found);
    }
    std::fflush(stdout);
    wrong += found;
  }
  for (const hetconv::Int8Kernels* k : hetconv::int8_isas()) {
    if (workspaces || (!isa.empty() && isa != k->name)) continue;
    const int found = fuzz_int8(*k, seed + 2000003, cases);
    std::printf("int8 %s: %d layers, each on three images, %d wrong\n", k->name, cases, found);
    std::fflush(stdout);
    wrong += found;
  }
  if (!workspaces && (isa.empty() || isa == "programs")) {
    const int found = fuzz_programs(seed + 3000003, cases);
    std::printf("programs: %d saved, read, damaged and changed, %d wrong\n", cases, found);
    wrong += found;
  }
  return wrong ? 1 : 0;
}
