// SPDX-License-Identifier: Apache-2.0
// Mistakes made on purpose: a sanitizer that stays silent here would stay silent on the engine's.
#include <atomic>
#include <climits>
#include <cstdio>
#include <thread>

#include "../../csrc/cpu/threads.h"
#include "driver.h"

namespace driver {

// Calls of the engine, of several threads, two at once: with the same output they race. Where one
// of them ends before the other begins, a lock that both take orders them; so both wait for each
// other first, by what orders nothing, and there are several rounds.
static int run_engine(const hetconv::Kernels& isa, bool race) {
  const int size = 32;
  const std::vector<uint8_t> mask(size_t(size) * size, 1);
  const hetconv::Plan plan(mask.data(), size, size, 1, 1, DType::f32, isa, "auto", true);
  const std::vector<float> w(mask.size(), 1.0f);
  const hetconv::Packed packed(plan, {reinterpret_cast<const char*>(w.data()), size, 1, 1, 1},
                               DType::f32, 1);
  std::vector<float> x(size_t(size) * 400, 1.0f), y(x.size()), other(x.size());
  const auto call = [&](std::vector<float>& to) {
    hetconv::Problem p{};
    p.N = 1;
    p.C = p.F = size;
    p.H = p.W = p.Ho = p.Wo = 20;
    p.KH = p.KW = p.sh = p.sw = p.dh = p.dw = 1;
    p.x = {reinterpret_cast<char*>(x.data()), size * 400, 1, size * 20, size};
    p.y = {reinterpret_cast<char*>(to.data()), size * 400, 1, size * 20, size};
    p.threads = 2;
    hetconv::fprop(plan, packed, p);
  };
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> there(0);
    const auto meet = [&] {
      there.fetch_add(1, std::memory_order_relaxed);
      while (there.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
    };
    std::thread second([&] {
      meet();
      call(race ? y : other);
    });
    meet();
    call(y);
    second.join();
  }
  return int(y[0]);
}

static int run_team(bool race) {
  int shared = 0;
  std::atomic<int> counted(0);
  hetconv::in_parallel(4, [&](int) {
    if (race)
      ++shared;
    else
      ++counted;
  });
  return shared + counted;
}

int make_mistake(const std::string& name) {
  volatile int zero = 0;
  if (name == "memory") {
    // Right behind a workspace as the engine asks for it.
    float* room = static_cast<float*>(hetconv::workspace(64));
    return int(room[16 + zero]);
  }
  if (name == "undefined") {
    volatile int most = INT_MAX;
    return most + 1 == 0;
  }
  if (name == "leak") {
    volatile char* lost = new char[100];
    lost[0] = 1;
    lost = nullptr;
    return 0;
  }
  if (name == "race") return run_team(true) == 0;
  if (name == "no-race") {
    int wrong = run_team(false) != 4;
    for (const hetconv::Kernels* k : hetconv::available_isas())
      wrong += run_engine(*k, false) != 32;
    return wrong;
  }
  if (name.rfind("engine-race-", 0) == 0)
    return run_engine(hetconv::isa_named(name.substr(12)), true) == 0;
  std::fprintf(stderr, "unknown mistake %s\n", name.c_str());
  return 2;
}

}  // namespace driver
