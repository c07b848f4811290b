// SPDX-License-Identifier: Apache-2.0
#include "engine.h"

#include <algorithm>

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

#include "memory.h"
#include "processor.h"

namespace hetconv {

// ---- which ISA ----

#if defined(__x86_64__)
static Kernels on_this(Kernels k, const Processor& processor) {
  k.half_vectors = processor.half_vectors;
  return k;
}

// AVX-512, but for what bfloat16 has of its own.
static Kernels with_bf16(Kernels k) {
  k.name = "avx512bf16";
  k.fprop[int(DType::bf16)] = kernels_avx512bf16.fprop;
  k.pack[int(DType::bf16)] = kernels_avx512bf16.pack;
  k.wgrad_channels[int(DType::bf16)] = kernels_avx512bf16.wgrad_channels;
  k.pairs = true;
  return k;
}
#endif

static std::vector<const Kernels*> machine_isas() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const Processor processor = this_processor();
  if (processor.avx512) {
    static const Kernels avx512 = on_this(kernels_avx512, processor);
    if (processor.avx512bf16) {
      static const Kernels bf16 = with_bf16(avx512);
      found.push_back(&bf16);
    }
    found.push_back(&avx512);
  }
  if (processor.avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_generic);
  return found;
}

std::vector<const Kernels*> available_isas() {
  std::vector<const Kernels*> found = machine_isas();
  const char* forced = std::getenv("HETCONV_ISA");
  if (!forced || !*forced) return found;
  for (const Kernels* k : found)
    if (std::strcmp(k->name, forced) == 0) return {k};
  throw std::invalid_argument(std::string("HETCONV_ISA is '") + forced +
                              "', which this machine cannot run; expected avx512bf16, avx512, "
                              "avx2 or generic (unset it to choose the best)");
}

const Kernels& isa_named(const std::string& name) {
  if (name.empty()) return *available_isas().front();
  for (const Kernels* k : machine_isas())
    if (name == k->name) return *k;
  throw std::invalid_argument("isa '" + name +
                              "' is not one that this machine can run: avx512bf16, avx512, avx2, "
                              "generic");
}

// ---- threads ----

namespace {
std::atomic<bool> forked(false);
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
}  // namespace

int usable_threads(int threads) { return threads < 1 || forked.load() ? 1 : threads; }

// ---- offsets by band layout ----

struct OffsetCache {
  static constexpr size_t kMostEntries = 32, kMostBytes = 1u << 20;
  struct Entry {
    OffsetKey key;
    int* offsets;
    size_t bytes;
    uint64_t used;  // when it was asked for last
  };
  std::mutex lock;
  std::vector<Entry> entries;
  size_t bytes = 0;
  uint64_t now = 0;
  int calls = 0;  // that may hold an entry
  ~OffsetCache() {
    for (Entry& e : entries) std::free(e.offsets);
  }
  bool is_full() const { return entries.size() > kMostEntries || bytes > kMostBytes; }
  // Frees what was not asked for the longest, but never the latest.
  void shrink() {
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return a.used > b.used; });
    while (entries.size() > 1 && is_full()) {
      bytes -= entries.back().bytes;
      std::free(entries.back().offsets);
      entries.pop_back();
    }
  }
};

OffsetCache* offsets_new() { return new OffsetCache; }
void offsets_delete(OffsetCache* c) { delete c; }

size_t offsets_count(OffsetCache* c) {
  std::lock_guard<std::mutex> hold(c->lock);
  return c->entries.size();
}

OffsetUse::OffsetUse(OffsetCache* c) : cache(c) {
  std::lock_guard<std::mutex> hold(c->lock);
  ++c->calls;
}
OffsetUse::~OffsetUse() {
  std::lock_guard<std::mutex> hold(cache->lock);
  if (--cache->calls == 0 && cache->is_full()) cache->shrink();
}

static const int* find_locked(OffsetCache* c, const OffsetKey& key) {
  for (OffsetCache::Entry& e : c->entries)
    if (std::memcmp(&e.key, &key, sizeof key) == 0) {
      e.used = ++c->now;
      return e.offsets;
    }
  return nullptr;
}

const int* offsets_find(OffsetCache* c, const OffsetKey& key) {
  std::lock_guard<std::mutex> hold(c->lock);
  return find_locked(c, key);
}

const int* offsets_keep(OffsetCache* c, const OffsetKey& key, int* fresh, size_t bytes) {
  std::lock_guard<std::mutex> hold(c->lock);
  if (const int* other = find_locked(c, key)) {
    std::free(fresh);
    return other;
  }
  c->entries.push_back({key, fresh, bytes, ++c->now});
  c->bytes += bytes;
  return fresh;
}

// ---- weights and calls ----

Packed::Packed(const Plan& plan, const WeightView& w, DType from, int threads)
    : bytes_(0), data_(nullptr, std::free) {
  const Lowered& low = plan.lowered();
  bytes_ = (size_t(low.packed) * plan.accumulator_bytes() + 2 * 64) / 64 * 64;
  data_.reset(allocate(bytes_));
  plan.kernels().pack[int(plan.dtype())](low, w, from, data_.get(), usable_threads(threads));
}

void forget_idle_strides(Problem* p) {
  if (p->Ho == 1) p->sh = 1;
  if (p->Wo == 1) p->sw = 1;
}

bool fprop(const Plan& plan, const Packed& packed, Problem p) {
  const int tile = plan.lowered().winograd ? plan.lowered().winograd->tile : 0;
  if (!takes_steps(tile, p))
    throw std::invalid_argument(std::string("the form \"") + plan.form() +
                                "\" is for dilation 1 and stride " + std::to_string(phases(tile)));
  if (p.N == 0 || p.F == 0 || p.Ho <= 0 || p.Wo <= 0) return true;
  p.threads = usable_threads(p.threads);
  forget_idle_strides(&p);
  const OffsetUse use(plan.offsets());
  return plan.kernels().fprop[int(plan.dtype())](plan.lowered(), use.cache, p, packed.data());
}

}  // namespace hetconv
