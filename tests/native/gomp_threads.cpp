// SPDX-License-Identifier: Apache-2.0
// As much of GCC's OpenMP runtime as the engine calls, on std::thread. The thread sanitizer does
// not know how libgomp waits and reports races that are none; it understands starting and joining
// a thread. The engine is compiled as ever (-fopenmp), only its runtime is this one. A construct
// that is not here fails to link. The calls are those of libgomp's manual, "The libgomp ABI".
#include <atomic>
#include <thread>
#include <vector>

namespace {
struct Loop {
  std::atomic<long> next{0};
  long end = 0, step = 1, chunk = 1;
  std::atomic<int> entered{0};
};
struct Team {
  int size = 1;
  Loop loop;  // one work-sharing loop a region
};
thread_local Team* team = nullptr;
thread_local int number = 0;

bool next_chunk(Loop& loop, long* from, long* to) {
  const long stride = loop.step * loop.chunk, at = loop.next.fetch_add(stride);
  if (at >= loop.end) return false;
  *from = at;
  *to = at + stride < loop.end ? at + stride : loop.end;
  return true;
}
}  // namespace

extern "C" {

int omp_get_num_threads() { return team ? team->size : 1; }
int omp_get_thread_num() { return number; }

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

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* from,
                                          long* to) {
  Loop& loop = team->loop;
  // The first to come lays the loop out; the engine's loops all count up.
  int none = 0;
  if (loop.entered.compare_exchange_strong(none, 1)) {
    loop.end = end;
    loop.step = step;
    loop.chunk = chunk;
    loop.next.store(start);
    loop.entered.store(2);
  }
  while (loop.entered.load() != 2) std::this_thread::yield();
  return next_chunk(loop, from, to);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) {
  return next_chunk(team->loop, from, to);
}

void GOMP_loop_end_nowait() {}
}
