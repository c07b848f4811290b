# SPDX-License-Identifier: Apache-2.0
# `make` lists the commands. Each sets up everything it needs, in .venv; running it again is fast.
#
#   PYTHON  the interpreter that makes .venv (3.11 to 3.13); by default the first one found
#   PY      an interpreter that already has torch and pytest: used as it is, nothing is installed
#   TORCH   cpu or cuda; by default cuda where nvidia-smi is found
#   ARGS    more arguments for the command, as in: make test ARGS="-k support -x"; those of
#           `make gpu` go to its benchmarks

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env test browser peers demo bench gpu docs docs-version dist wheels roots library lint \
	format types aot external sanitize \
	sanitize-python clang aarch64 clean

VENV := .venv
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $(name))))
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
TORCH_PIN := $(shell sed -n 's/^torch==/torch==/p' constraints/$(TORCH).txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url $(TORCH_CPU_INDEX))
SOURCES := $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES := $(filter %.h %.cpp %.cu,$(SOURCES)) \
	$(wildcard $(foreach folder,tests/native tests/native/cuda tests/native/deploy,$(folder)/*.h \
	$(folder)/*.cpp $(folder)/*.c))
CLANG_FORMAT ?= $(VENV)/bin/clang-format
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# In the tree the CUDA part is built for the GPUs of this machine, or for one that tests look at;
# an installed package is for all.
IN_TREE := HETCONV_CUDA_ARCHS=$(or $(HETCONV_CUDA_ARCHS),$(if $(shell command -v nvidia-smi \
	2>/dev/null),native,80))

# Nothing is compiled twice where g++ compiles, and no kernel where nvcc does.
ifneq (,$(and $(filter default undefined,$(origin CXX)),$(filter 1,$(words $(CURDIR))),\
	$(wildcard .ci/cxx),$(shell command -v g++ 2>/dev/null)))
export CXX := $(CURDIR)/.ci/cxx
endif
ifneq (,$(and $(filter undefined,$(origin NVCC)),$(filter 1,$(words $(CURDIR))),\
	$(wildcard .ci/nvcc),$(shell command -v nvcc 2>/dev/null)))
export NVCC := $(CURDIR)/.ci/nvcc
endif

ifdef PY
ENV := inplace
export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))
else
ENV := $(VENV)/.built
PY := $(VENV)/bin/python
endif

help: ## This list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

env: $(ENV) ## Set everything up in .venv, run nothing

# Without ARGS all of them, a process for each core: see tests/in_parts.py.
test: $(ENV) ## Run the tests
	$(PY) $(if $(ARGS),-m pytest $(ARGS),tests/in_parts.py)

# The report's page is checked in a real browser; tests/test_report_browser.py skips without one.
browser: ## Install Chromium for the test of the report (needs apt and root; nothing if one is there)
	@for name in chromium chromium-browser google-chrome; do \
	    if command -v $$name >/dev/null; then echo "make browser: $$name is there"; exit 0; fi; \
	done; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "make browser: no Chromium was found, and it takes root and apt-get to install one." >&2; \
	    exit 1; \
	fi; \
	apt-get update -q && apt-get install -y -q --no-install-recommends chromium

# ONNX Runtime comes with the tests' packages; without OpenVINO its tests are skipped.
peers: $(ENV) $(if $(filter inplace,$(ENV)),,$(VENV)/.peers) ## Install the engines that networks are measured beside

demo: $(ENV) ## Denoise a photograph with dense, HetConv and self-grouped networks
	$(PY) -m hetconv_kernels demo $(ARGS)

bench: $(ENV) ## Measure the layers; a fair clock needs an otherwise idle machine
	$(PY) -m hetconv_kernels bench $(ARGS)

# A machine with a GPU often has its own PyTorch and no network: that interpreter is used as it is.
gpu: ## Run the GPU's tests, then the table of its primitives (needs an NVIDIA GPU)
	@$(MAKE) --no-print-directory gpu-find GOAL=gpu

# SHARD=i/n measures one of n parts; run again, it goes on where it stopped.
gpu-full: ## Measure all shapes, batches, Supports and dtypes on the GPU; SHARD=i/n for a part
	@$(MAKE) --no-print-directory gpu-find GOAL=gpu-full

gpu-sanitize: ## Run the GPU's tests under compute-sanitizer: memcheck, racecheck and synccheck
	@$(MAKE) --no-print-directory gpu-find GOAL=gpu-sanitize

.PHONY: gpu-find gpu-full gpu-sanitize gpu-full-run gpu-sanitize-run
gpu-find:
	@found=; has_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	for py in $(if $(filter inplace,$(ENV)),$(PY),python3 $(VENV)/bin/python); do \
	    if "$$py" -c "$$has_gpu" 2>/dev/null; then found="$$py"; break; fi; \
	done; \
	if [ -z "$$found" ] && command -v nvidia-smi >/dev/null; then \
	    $(MAKE) env && $(VENV)/bin/python -c "$$has_gpu" && found=$(VENV)/bin/python; \
	fi; \
	if [ -z "$$found" ]; then \
	    echo "make $(GOAL): no NVIDIA GPU that PyTorch can use was found, so nothing was run. It needs a" \
	         "GPU, its driver, and a python3 whose torch.cuda.is_available() is True (or name one:" \
	         "make $(GOAL) PY=/path/to/python). Without a GPU, 'make test' runs everything else." >&2; \
	    exit 2; \
	fi; \
	echo "make $(GOAL): using $$found"; $(MAKE) $(GOAL)-run PY="$$found"

.PHONY: gpu-run
# All of it stays below ten minutes: the build; the smoke test of each engine's parts, each in a
# process of its own; the table of what passed; and the tests, CUDA's first, for the time that is left.
# What hangs is killed and left out. Results and log (gpu.log) are where --results says.
GPU_SECONDS ?= 570
gpu-run:
	@$(IN_TREE) $(PY) -m benchmarks.session --seconds $(GPU_SECONDS) $(ARGS)

gpu-full-run: inplace
	$(PY) -m benchmarks.primitives --full --shard $(or $(SHARD),1/1) $(ARGS)

# Without torch's cache of memory each tensor is an allocation, whose ends memcheck knows.
gpu-sanitize-run: inplace
	@command -v compute-sanitizer >/dev/null || { echo "make gpu-sanitize: compute-sanitizer was not" \
	    "found, so nothing was run. It comes with the CUDA toolkit; put its folder on PATH." >&2; exit 2; }
	for tool in memcheck racecheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) -m pytest -q -m gpu \
	        tests/test_gpu_triton.py tests/test_gpu_cuda*.py tests/test_gpu_engines.py \
	        -k "oracle or uneven or epilogue or bit_for_bit or tiles" $(ARGS) || exit 1; \
	done

docs: $(ENV) $(if $(filter inplace,$(ENV)),,$(VENV)/.docs) ## Build the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "Open site/index.html; its search wants a server: $(PY) -m http.server -d site"

docs-version: $(ENV) $(if $(filter inplace,$(ENV)),,$(VENV)/.docs) ## Add this version's documentation to site-versions/
	NO_MKDOCS_2_WARNING=1 $(PY) docs/versions.py site-versions

# The wheel is built from the source distribution, so that what is missing in that shows.
dist: $(ENV) ## Build the source distribution and the wheel in dist/, and check the wheel
	rm -rf dist *.egg-info
	$(PY) setup.py --quiet sdist --dist-dir dist
	$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation \
	    --wheel-dir dist dist/*.tar.gz
	$(PY) .ci/wheel.py dist/*.whl

# Needs no Python: a C++17 compiler with OpenMP.
library: ## Build libhetconv, which runs saved programs without Python, in build/library
	$(MAKE) --no-print-directory -j$(or $(MAX_JOBS),2) -f csrc/Makefile

# See .ci/wheels.py. MACHINES="x86_64 aarch64" cross-compiles too.
MACHINES ?= x86_64
wheels: $(ENV) $(if $(filter inplace,$(ENV)),,$(VENV)/.release) ## Build the manylinux wheels of every Python here, in dist/
	rm -rf dist *.egg-info
	$(PY) setup.py --quiet sdist --dist-dir dist
	$(PY) .ci/wheels.py dist/*.tar.gz dist --machines $(MACHINES) $(ARGS)

# In roots of Debian that debootstrap makes, with Python and nothing else: needs root and debootstrap.
SUITES ?= bookworm trixie
roots: ## Try dist/'s manylinux wheels in empty roots of other systems (needs root and debootstrap)
	for suite in $(SUITES); do .ci/root $$suite dist $(WHEELS) || exit 1; done

lint: $(ENV) ## Check style: ruff, and clang-format for csrc
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(CXX_SOURCES),$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES),\
	    @echo "clang-format: no C++ in the tree yet, nothing to check")

format: $(ENV) ## Put the style right
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CXX_SOURCES),$(CLANG_FORMAT) -i $(CXX_SOURCES))

types: $(ENV) ## Check types: mypy, strict on the core
	$(PY) -m mypy

# The installed Triton and the oldest supported one; what has not changed is not compiled again.
OLDEST_TRITON := 3.6.0
aot: $(ENV) build/triton-$(OLDEST_TRITON)/.there ## Compile the kernels for every GPU generation, without a GPU
	@$(MAKE) --no-print-directory -O -j$(or $(MAX_JOBS),2) aot-newest aot-cuda aot-oldest

.PHONY: aot-newest aot-oldest aot-cuda
aot-newest:
	HETCONV_AOT_ALL=1 $(PY) -m pytest -q tests/test_aot.py tests/test_rehearsal.py $(ARGS)

aot-oldest:
	HETCONV_AOT_ALL=1 HETCONV_AOT_TRITON=$(CURDIR)/build/triton-$(OLDEST_TRITON) \
	    $(PY) -m pytest -q tests/test_aot.py $(ARGS)
	PYTHONPATH=$(CURDIR)/build/triton-$(OLDEST_TRITON):. $(PY) -m pytest -q tests/test_rehearsal.py $(ARGS)

aot-cuda:
	HETCONV_AOT_ALL=1 $(PY) -m pytest -q tests/test_cuda_code.py $(ARGS)

build/triton-$(OLDEST_TRITON)/.there: | $(ENV)
	$(PY) -m pip --disable-pip-version-check install --quiet --no-deps --target $(@D) \
	    triton==$(OLDEST_TRITON)
	@touch $@

# In a folder of their own: PyPI's torchvision is built for CUDA, and cannot be imported as it is
# beside a CPU build of torch (tests/external.py says what it lacks).
EXTERNAL := timm torchvision segmentation_models_pytorch
external: $(ENV) build/external/.there ## Take networks of timm, torchvision and smp the whole way
	PYTHONPATH=$(CURDIR):build/external $(PY) -m pytest -q --slow tests/test_external.py \
	    tests/test_external_detection.py tests/test_factory.py tests/test_examples.py::test_detection \
	    $(ARGS)

build/external/.there: constraints/common.txt | $(ENV)
	rm -rf $(@D)
	$(PY) -m pip --disable-pip-version-check install --quiet --no-deps --target $(@D) \
	    $(foreach name,$(EXTERNAL),$(shell grep '^$(name)==' constraints/common.txt)) \
	    $(shell grep '^tqdm==' constraints/common.txt)
	@touch $@

# Needs no Python: two builds of tests/native, which run side by side.
SANITIZERS ?= asan tsan
sanitize: ## Fuzz the compiled CPU part under the address, leak, undefined and thread sanitizers
	$(MAKE) --no-print-directory -j$(or $(MAX_JOBS),2) -f tests/native/Makefile $(SANITIZERS)

# clang, or the one that PyPI's ziglang brings in .venv. Objects only: ziglang has no OpenMP to link.
CLANGXX ?= $(or $(shell command -v clang++ 2>/dev/null),$(PY) -m ziglang c++ -mcpu=baseline)
clang: $(ENV) ## Compile the CPU part and tests/native with clang, warnings as errors
	ZIG_GLOBAL_CACHE_DIR=$(CURDIR)/build/clang/cache $(MAKE) --no-print-directory \
	    -j$(or $(MAX_JOBS),2) -f tests/native/Makefile objects build/clang/plain/engine/bindings.o \
	    CXX="$(CLANGXX)" OUT=build/clang OPTIMISE_plain=-O1 CXXFLAGS="-Werror \
	    -fno-sanitize=undefined $$($(PY) -c \
	    "import pybind11 as p, sysconfig as s; print('-I' + p.get_include(), '-I' + s.get_path('include'))")"

# Under an emulator nothing can be said of speed. qemu's max has the dot product, a Cortex-A53 has
# not: there the engine has to choose its generic form. Without GCC's cross compiler and qemu-user,
# and root to install them, clang compiles the objects, and nothing runs.
ARM_GCC := aarch64-linux-gnu-g++
ARM_RUN := qemu-aarch64 -L /usr/aarch64-linux-gnu
ARM_DRIVER := build/aarch64/plain/driver
ARM_CLANG := $(PY) -m ziglang c++ -target aarch64-linux-gnu
aarch64: $(ENV) ## Cross-compile the CPU part for aarch64 and check it under qemu-user
	@has() { command -v $(ARM_GCC) && command -v $(firstword $(ARM_RUN)); } >/dev/null; \
	if ! has && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && apt-get install -y -q --no-remove g++-aarch64-linux-gnu qemu-user; \
	fi; \
	if has; then $(MAKE) --no-print-directory aarch64-run; \
	else $(MAKE) --no-print-directory aarch64-objects; fi

.PHONY: aarch64-run aarch64-objects
aarch64-run:
	$(MAKE) --no-print-directory -j$(or $(MAX_JOBS),2) -f tests/native/Makefile $(ARM_DRIVER) \
	    CXX=$(ARM_GCC) OUT=build/aarch64 OPTIMISE_plain=-O1 CXXFLAGS=-Werror
	said=$$($(ARM_RUN) -cpu max $(ARM_DRIVER) --cases $(or $(CASES),100)) || { echo "$$said"; exit 1; }; \
	echo "$$said"; grep -q "^int8 neondot" <<<"$$said"
	said=$$($(ARM_RUN) -cpu cortex-a53 $(ARM_DRIVER) --cases 5) || { echo "$$said"; exit 1; }; \
	echo "$$said"; ! grep -q neondot <<<"$$said"

aarch64-objects:
	ZIG_GLOBAL_CACHE_DIR=$(CURDIR)/build/clang/cache $(MAKE) --no-print-directory \
	    -j$(or $(MAX_JOBS),2) -f tests/native/Makefile objects CXX="$(ARM_CLANG)" \
	    OUT=build/aarch64-clang OPTIMISE_plain=-O1 \
	    CXXFLAGS="-Werror -fno-sanitize=undefined"
	@echo "make aarch64: compiled, never run: it takes $(ARM_GCC) and qemu-user to run it"

# The bindings too. A second build beside the tree's own; Python itself is not instrumented, hence
# the preload.
sanitize-python: $(ENV)
	HETCONV_BUILD=require HETCONV_CUDA_ARCHS=none \
	    CXXFLAGS="$(SANITIZE) -O1 -g" LDFLAGS="$(SANITIZE)" \
	    $(PY) setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	PYTHONPATH=build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    $(PY) -P -m pytest $(or $(ARGS),$(wildcard tests/test_cpu*.py))

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) build dist site *.egg-info hetconv_kernels/*.so hetconv_kernels/_build.json

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
	    echo "No Python 3.11, 3.12 or 3.13 was found: install one, or name it: make PYTHON=..." >&2; \
	    exit 2; \
	fi
	$(PYTHON) -m venv $(VENV)

# Torch first and alone: the CPU build is not on PyPI, and the place that has it need not be asked
# for every other package. A mirror or a wheel folder in pip's own settings is tried before it.
$(VENV)/.packages: pyproject.toml constraints/common.txt constraints/$(TORCH).txt | $(VENV)/bin/python
	@echo "$(PIP) $(TORCH_PIN)"
	@$(PIP) --no-deps '$(TORCH_PIN)' 2>/dev/null || \
	    $(PIP) --no-deps $(TORCH_INDEX) '$(TORCH_PIN)' || { \
	        echo "make: $(TORCH_PIN) could not be had. For the CPU build name an index that has it" \
	             "(make TORCH_CPU_INDEX=...) or take PyPI's build of several GB (make TORCH=cuda)." >&2; \
	        exit 1; }
	$(PIP) -c constraints/$(TORCH).txt '$(TORCH_PIN)' setuptools wheel pybind11
	HETCONV_BUILD=none $(PIP) -c constraints/$(TORCH).txt --no-build-isolation -e '.[dev,demo]'
	@touch $@

$(VENV)/.docs: $(VENV)/.packages
	HETCONV_BUILD=none $(PIP) -c constraints/$(TORCH).txt --no-build-isolation -e '.[docs]'
	@touch $@

$(VENV)/.peers: $(VENV)/.packages
	HETCONV_BUILD=none $(PIP) -c constraints/$(TORCH).txt --no-build-isolation -e '.[peers]'
	@touch $@

$(VENV)/.release: $(VENV)/.packages
	HETCONV_BUILD=none $(PIP) -c constraints/$(TORCH).txt --no-build-isolation -e '.[release]'
	@touch $@

# No stamp while a part is missing, so that installing a compiler is enough to get it.
$(VENV)/.built: $(VENV)/.packages setup.py $(SOURCES)
	$(IN_TREE) $(VENV)/bin/python setup.py --quiet build_ext --inplace
	@grep -q '"built": false' hetconv_kernels/_build.json || touch $@

.PHONY: inplace
inplace:
	$(IN_TREE) $(PY) setup.py --quiet build_ext --inplace
