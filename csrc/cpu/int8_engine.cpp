// SPDX-License-Identifier: Apache-2.0
#include "int8_engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "engine.h"
#include "processor.h"

namespace hetconv {

static std::vector<const Int8Kernels*> machine_int8_isas() {
  std::vector<const Int8Kernels*> found;
#if defined(__x86_64__)
  const Processor processor = this_processor();
  if (processor.avx512vnni) found.push_back(&int8_kernels_avx512vnni);
  if (processor.avxvnni) found.push_back(&int8_kernels_avxvnni);
  if (processor.avx2) found.push_back(&int8_kernels_avx2);
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

Int8Lanes int8_lanes(const Int8Packed& packed, const Int8Problem& p, const float* multiplier,
                     const int32_t* bias) {
  const Int8Plan& plan = packed.plan();
  const Int8Lowered& low = plan.lowered();
  const size_t count = size_t(low.lanes);
  Int8Lanes lanes{std::vector<float>(count, 0.0f), std::vector<int32_t>(count, 0), 0.0f};
  const uint32_t zero = uint32_t(p.x_zero + (p.x_type == Byte::s8 ? 128 : 0) -
                                 (plan.kernels().signed_bytes ? 128 : 0));
  for (size_t l = 0; l < count; ++l) {
    const int f = low.filters[l];
    if (f < 0) continue;
    lanes.multiplier[l] = multiplier[f];
    lanes.reach =
        std::max(lanes.reach, std::fabs(multiplier[f]) * float(255 * packed.reach()[size_t(f)] +
                                                               std::abs(int64_t(bias[f]))));
    // The sum is within int32 in the end; on the way it may wrap.
    lanes.bias[l] = int32_t(uint32_t(bias[f]) - zero * uint32_t(packed.sums()[size_t(f)]));
  }
  return lanes;
}

bool int8_fprop(const Int8Packed& packed, Int8Problem p, const Int8Lanes& lanes) {
  const Int8Plan& plan = packed.plan();
  if (p.N == 0 || p.Ho <= 0 || p.Wo <= 0) return true;
  p.threads = usable_threads(p.threads);
  p.multiplier = lanes.multiplier.data();
  p.bias = lanes.bias.data();
  const float residual = p.res ? 255 * std::fabs(p.res_multiplier) : 0.0f;
  p.bounded = lanes.reach + residual < float(1 << 30);
  const OffsetUse use(plan.offsets());
  return plan.kernels().fprop(plan.lowered(), use.cache, p, packed.data());
}

bool int8_fprop(const Int8Packed& packed, Int8Problem p, const float* multiplier,
                const int32_t* bias) {
  return int8_fprop(packed, p, int8_lanes(packed, p, multiplier, bias));
}

}  // namespace hetconv
