// SPDX-License-Identifier: Apache-2.0
// As much of GCC's OpenMP runtime as the engine calls, on std::thread. The thread sanitizer does
// not know how libgomp waits and reports races that are none; it understands starting and joining
// a thread. The engine is compiled as ever, only its runtime is this one. A function that is not
// here fails to link. The calls are those of libgomp's manual, "The libgomp ABI".
#include <thread>
#include <vector>

namespace {
struct Team {
  int size = 1;
};
thread_local Team* team = nullptr;
thread_local int number = 0;
}  // namespace

extern "C" {

int omp_get_num_threads() { return team ? team->size : 1; }
int omp_get_thread_num() { return number; }
int omp_get_max_threads() { return 2; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team mine;
  // A region within a region has one thread, as is OpenMP's default.
  mine.size = threads == 0 || team ? 1 : int(threads);
  Team* const outer = team;
  const int outer_number = number;
  std::vector<std::thread> others;
  for (int i = 1; i < mine.size; ++i)
    others.emplace_back([&mine, body, data, i] {
      team = &mine;
      number = i;
      body(data);
    });
  team = &mine;
  number = 0;
  body(data);
  for (std::thread& t : others) t.join();
  team = outer;
  number = outer_number;
}
}
