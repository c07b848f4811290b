// SPDX-License-Identifier: Apache-2.0
#include "int8_engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "engine.h"

namespace hetconv {

#if defined(__x86_64__)
static bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

static std::vector<const Int8Kernels*> machine_int8_isas() {
  std::vector<const Int8Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    found.push_back(&int8_kernels_avx512vnni);
  if (has_avxvnni()) found.push_back(&int8_kernels_avxvnni);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&int8_kernels_avx2);
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long asimddp = 1ul << 20;  // HWCAP_ASIMDDP: sdot and udot
  if (getauxval(AT_HWCAP) & asimddp) found.push_back(&int8_kernels_neondot);
#endif
  found.push_back(&int8_kernels_generic);
  return found;
}

// $HETCONV_ISA names the float engine's: avx2 and generic keep what is no more than that.
std::vector<const Int8Kernels*> int8_isas() {
  std::vector<const Int8Kernels*> found = machine_int8_isas();
  const char* asked = std::getenv("HETCONV_ISA");
  const std::string forced = asked && *asked ? available_isas()[0]->name : "";
  if (forced != "avx2" && forced != "generic") return found;
  std::vector<const Int8Kernels*> kept;
  for (const Int8Kernels* k : found)
    if (forced == k->name) kept.push_back(k);
  return kept;
}

const Int8Kernels& int8_isa_named(const std::string& name) {
  if (name.empty()) return *int8_isas().front();
  for (const Int8Kernels* k : machine_int8_isas())
    if (name == k->name) return *k;
  throw std::invalid_argument("isa '" + name +
                              "' is not one that this machine can run: avx512vnni, avxvnni, avx2, "
                              "neondot, generic");
}

int int8_unfit_filter(const Int8Packed& packed, const float* multiplier, const int32_t* bias,
                      int64_t* bound) {
  for (int f = 0; f < packed.plan().lowered().F; ++f) {
    *bound = 255 * packed.reach()[size_t(f)] + std::abs(int64_t(bias[f]));
    if (*bound > INT32_MAX) return f;
    *bound = 0;
    if (!std::isfinite(multiplier[f])) return f;
  }
  return -1;
}

bool int8_fprop(const Int8Packed& packed, Int8Problem p, const float* multiplier,
                const int32_t* bias) {
  const Int8Plan& plan = packed.plan();
  const Int8Lowered& low = plan.lowered();
  if (p.N == 0 || p.Ho <= 0 || p.Wo <= 0) return true;
  p.threads = usable_threads(p.threads);
  // What each lane needs, in one piece of memory; the zero point of x is a constant of each filter.
  const size_t lanes = size_t(low.lanes);
  std::unique_ptr<void, void (*)(void*)> data(std::malloc(8 * lanes + 64), std::free);
  if (!data) throw std::bad_alloc();
  float* scales = static_cast<float*>(data.get());
  int32_t* shifts = reinterpret_cast<int32_t*>(scales + lanes);
  const uint32_t zero = uint32_t(p.x_zero + (p.x_type == Byte::s8 ? 128 : 0) -
                                 (plan.kernels().signed_bytes ? 128 : 0));
  float reach = 0;
  for (size_t l = 0; l < lanes; ++l) {
    const int f = low.filters[l];
    scales[l] = f < 0 ? 0.0f : multiplier[f];
    if (f >= 0)
      reach = std::max(reach, std::fabs(multiplier[f]) * float(255 * packed.reach()[size_t(f)] +
                                                               std::abs(int64_t(bias[f]))));
    // The sum is within int32 in the end; on the way it may wrap.
    shifts[l] = f < 0 ? 0 : int32_t(uint32_t(bias[f]) - zero * uint32_t(packed.sums()[size_t(f)]));
  }
  if (p.res) reach += 255 * std::fabs(p.res_multiplier);
  p.bounded = reach < float(1 << 30);
  p.multiplier = scales;
  p.bias = shifts;
  return plan.kernels().fprop(low, plan.offsets(), p, packed.data());
}

}  // namespace hetconv
