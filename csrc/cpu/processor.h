// SPDX-License-Identifier: Apache-2.0
// What this processor can do and its system saves the registers of. By cpuid rather than by
// __builtin_cpu_supports, which needs a compiler's run-time library: ziglang 0.17's answers that
// there is nothing.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>

namespace hetconv {

struct Processor {
  bool avx2 = false;    // with fma and f16c
  bool avx512 = false;  // f, bw, dq and vl
  bool avx512bf16 = false, avx512vnni = false, avx512vbmi = false, avx512vbmi2 = false;
  bool avxvnni = false;
  bool half_vectors = false;  // what takes 512 bits is executed as two halves: Zen 4
};

// Not inline: the sources of an instruction set have no use for it.
static Processor this_processor() {
  Processor found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const auto has = [](unsigned word, unsigned bits) { return (word & bits) == bits; };
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 1u << 27)) return found;  // no xgetbv
  const bool family_19h = (a >> 8 & 0xf) == 0xf && (a >> 20 & 0xff) == 0xa;
  const unsigned fma_avx_f16c = 1u << 12 | 1u << 28 | 1u << 29;
  const bool vectors = has(c, fma_avx_f16c);
  unsigned saved = 0, high = 0;  // by the system, at a switch of threads
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!vectors || !has(saved, 0x6) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  found.avx2 = has(b, 1u << 5);
  found.avx512 = has(saved, 0xe6) && has(b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31);
  found.half_vectors = found.avx512 && family_19h;  // of which Zen 3 has no AVX-512
  found.avx512vbmi = found.avx512 && has(c, 1u << 1);
  found.avx512vbmi2 = found.avx512 && has(c, 1u << 6);
  found.avx512vnni = found.avx512 && has(c, 1u << 11);
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    found.avxvnni = found.avx2 && has(a, 1u << 4);
    found.avx512bf16 = found.avx512 && has(a, 1u << 5);
  }
  return found;
}

}  // namespace hetconv
#endif
