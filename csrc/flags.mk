# SPDX-License-Identifier: Apache-2.0
# How the sources of csrc/cpu are compiled without Python: as in setup.py, less the optimisation.

FLAGS := -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=fast \
	-Wall -Wextra -Wno-psabi
ISA_FLAGS_isa_avx2 := -mavx2 -mfma -mf16c
ISA_FLAGS_isa_avx512 := $(ISA_FLAGS_isa_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl \
	-mprefer-vector-width=512
ISA_FLAGS_isa_avx512bf16 := $(ISA_FLAGS_isa_avx512) -mavx512bf16
ISA_FLAGS_isa_int8_avx2 := $(ISA_FLAGS_isa_avx2)
ISA_FLAGS_isa_int8_avxvnni := $(ISA_FLAGS_isa_avx2) -mavxvnni
ISA_FLAGS_isa_int8_avx512vnni := $(ISA_FLAGS_isa_avx512) -mavx512vnni
# ziglang's clang spells it in its own way.
ARM_FLAGS_isa_int8_neondot := $(if $(findstring ziglang,$(CXX)),-mcpu=generic+dotprod,-march=armv8.2-a+dotprod)
ARM := $(filter aarch64%,$(shell $(CXX) -dumpmachine))
X86 := $(filter x86_64%,$(shell $(CXX) -dumpmachine))
GCC_ONLY := $(if $(findstring clang,$(shell $(CXX) --version)),,-Wno-maybe-uninitialized)
# Of one source, by its name without a suffix. In 8 bits every operation is rounded once.
flags_of = $(if $(X86),$(ISA_FLAGS_$(1))) $(if $(ARM),$(ARM_FLAGS_$(1))) \
	$(if $(findstring int8,$(1)),-ffp-contract=off)
# What has no face to Python.
ENGINE := $(filter-out %bindings,$(patsubst csrc/cpu/%.cpp,%,$(wildcard csrc/cpu/*.cpp)))
