# The commands of the project; `make help` lists them. They work on a machine with Python >= 3.10, a C++17 compiler
# and make, and write to $(VENV), build/, dist/, the compiled torch_manualbp/_C*.abi3.so and caches (`make clean` removes
# them all); `make format` rewrites sources.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
ARGS ?=
SECONDS ?= 120

PIP := $(VENV)/bin/python -m pip install -qq --no-input --disable-pip-version-check
# The build looks for ninja on the path, so include the environment's programs.
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
INSTALL := $(RUN) $(PIP) --no-build-isolation --editable '.[demo,test]'
REBUILD := $(RUN) python setup.py -q build_ext --inplace >build/build.log 2>&1 || { cat build/build.log >&2; exit 1; }
SOURCES := $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
LEVELS := $(basename $(notdir $(wildcard csrc/cpu/kernels/*.cpp)))  # of instruction sets
BINARY := torch_manualbp/_C.abi3.so
DRIVERS := kernels network
# Tests use one thread each, so two processes halve the time. All tests of a file run in one process, because they may
# share something compiled or trained. ARGS='-n 0' runs everything in one process, as a debugger requires.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder
# There is a stamp per TORCH and TORCH_FLAGS, so that changing them installs another torch.
TORCH_STAMP := $(VENV)/.torch-$(shell echo '$(TORCH) $(TORCH_FLAGS)' | cksum | cut -d' ' -f1)

MAKEFLAGS += --no-print-directory
.PHONY: help demo test test-quick test-sanitizers test-cuda docs notebooks figures lint format bench bench-quick fuzz fuzz-night asan tsan \
        coverage aarch64 macos nehalem wheel wheel-aarch64 wheel-check sdist-check matrix release-check clean FORCE
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH=$(TORCH)  CXX=...  MAX_JOBS=...  ARGS=... (for the command that is run)"
	@echo "  TORCH_FLAGS=...  options of the pip command that installs torch. Where pip's default torch is a CUDA build,"
	@echo "                   --index-url with the address of PyTorch's CPU wheels saves gigabytes"

demo: $(VENV)/.ready  ## set up, build, and train the example
	@echo "==> training: examples/train_digits.py"
	@$(RUN) python examples/train_digits.py --output build/train_digits.png $(ARGS)

test: $(VENV)/.ready  ## set up, build, and run the test suite
	@echo "==> testing"
	@$(RUN) python -m pytest $(IN_TWO) -m 'not sanitizers' $(ARGS)

test-sanitizers: $(VENV)/.ready  ## kernels and passes, and emulated CUDA kernels, under sanitizers (some minutes)
	@echo "==> testing with sanitizers"
	@$(RUN) python -m pytest $(IN_TWO) -m sanitizers $(ARGS)

test-quick: $(VENV)/.ready  ## the tests that are not marked slow, for the edit loop (a minute)
	@echo "==> testing, quickly"
	@$(RUN) python -m pytest $(IN_TWO) -m 'not slow' $(ARGS)

test-cuda: $(VENV)/.ready  ## run the numerical tests on a GPU (TORCH=... a build with CUDA; a toolkit that fits it)
	@echo "==> testing on the GPU"
	@$(RUN) python -m pytest --device=cuda -m cuda $(ARGS)

docs: $(VENV)/.docs $(VENV)/.notebooks  ## build the documentation site, build/site/index.html; a warning is an error
	@echo "==> building build/site"
	@$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "    open build/site/index.html; the search needs a server: python3 -m http.server --directory build/site"

figures: $(VENV)/.ready  ## draw docs/figures/*.png, two minutes (ARGS=--check: only say which are stale)
	@$(RUN) python docs/draw_figures.py $(ARGS)

notebooks: $(VENV)/.notebooks  ## the lecture's chapters as notebooks, run: build/notebooks; `make docs` puts them into the site
	@echo "==> running the notebooks"
	@$(RUN) python docs/notebooks.py

lint: $(VENV)/.lint  ## ruff, clang-format and mypy
	@echo "==> linting"
	@$(RUN) ruff check -q .
	@$(RUN) ruff format -q --check . || { $(RUN) ruff format --check .; false; }
	@$(RUN) clang-format --dry-run --Werror $(CXX_FILES)
	@$(RUN) mypy

format: $(VENV)/.lint  ## rewrite the files as the linters want them
	@$(RUN) ruff check -q --fix .
	@$(RUN) ruff format -q .
	@$(RUN) clang-format -i $(CXX_FILES)

bench: $(VENV)/.bench  ## the speed tables, peak memory and scaling: build/*.md, *.json and *.png (three quarters of an hour)
	@mkdir -p build
	@$(RUN) python benchmarks/training_step.py --json build/bench.json --markdown build/bench.md $(ARGS)
	@$(RUN) python benchmarks/whole_step.py --json build/whole_step.json --markdown build/whole_step.md
	@$(RUN) python benchmarks/hand_written.py --json build/hand_written.json --markdown build/hand_written.md
	@$(RUN) python benchmarks/transforms.py --json build/transforms.json --markdown build/transforms.md
	@$(RUN) python benchmarks/peak_memory.py --json build/peak_memory.json --figure build/peak_memory.png >build/peak_memory.md
	@cat build/peak_memory.md
	@$(RUN) python benchmarks/scaling.py --json build/scaling.json --figure build/scaling.png

bench-quick: $(VENV)/.bench  ## the same with few rounds and points and no compilers, for a first look (3 minutes)
	@mkdir -p build
	@$(RUN) python benchmarks/training_step.py --quick --json build/bench.json --markdown build/bench.md $(ARGS)
	@$(RUN) python benchmarks/whole_step.py --quick --json build/whole_step.json --markdown build/whole_step.md
	@$(RUN) python benchmarks/hand_written.py --quick --json build/hand_written.json --markdown build/hand_written.md
	@$(RUN) python benchmarks/transforms.py --quick --json build/transforms.json --markdown build/transforms.md
	@$(RUN) python benchmarks/peak_memory.py --batches 1000 100000 --json build/peak_memory.json --figure build/peak_memory.png >build/peak_memory.md
	@cat build/peak_memory.md
	@$(RUN) python benchmarks/scaling.py --quick --json build/scaling.json --figure build/scaling.png

fuzz: $(VENV)/.ready  ## random calls against float64 autograd, random arguments against crashes, for SECONDS=120
	@$(RUN) PYTHONPATH=tests python -m fuzz --seconds $(SECONDS) $(ARGS)

fuzz-night: $(VENV)/.ready  ## 100,000 cases of each fuzzer (half an hour; a day at most)
	@$(RUN) PYTHONPATH=tests python -m fuzz --cases 100000 --seconds 86400 $(ARGS)

asan: $(DRIVERS:%=build/asan/%) build/asan/pool  ## kernels and passes under the address and undefined-behaviour sanitizers, on every level
	@$(call on_every_level,build/asan/kernels 1000)
	@$(call on_every_level,build/asan/network 50)
	@build/asan/pool 500

tsan: $(DRIVERS:%=build/tsan/%) build/tsan/pool  ## the same on several threads under the thread sanitizer
	@$(call on_every_level,build/tsan/kernels threads)
	@$(call on_every_level,build/tsan/network 10)
	@build/tsan/pool 500

aarch64: $(DRIVERS:%=build/aarch64/%)  ## kernels and passes on an emulated Arm processor (g++-aarch64-linux-gnu, qemu-user)
	@$(call emulated,qemu-aarch64,neon)
	@$(call emulated,MANUALBP_ISA=default qemu-aarch64,default)

macos: $(VENV)/.zig  ## compile csrc and the drivers for macOS on arm64: object files only, so nothing is linked or run
	@echo "==> compiling for macOS"
	@$(MAKE) -j $(or $(MAX_JOBS),$$(getconf _NPROCESSORS_ONLN)) $(patsubst %.cpp,build/macos/%.o,\
	  $(filter-out csrc/cuda/%,$(filter %.cpp,$(SOURCES))) $(DRIVERS:%=tests/csrc/%.cpp) tests/csrc/pool.cpp)

nehalem: $(DRIVERS:%=build/nehalem/%)  ## the same on an x86-64 without AVX: the baseline must be chosen (qemu-user)
	@$(call emulated,qemu-x86_64 -cpu Nehalem,default)

# Kernels are counted in separate programs, at each level and unoptimised, so that lines remain distinct. The suite runs
# with counted entries and uncounted kernels, in a separate package, so that the checkout's binary is unchanged. Counting
# enlarges the binary, and takes other functions of glibc.
coverage: $(VENV)/.coverage  ## which lines of Python and of C++ the tests reach: two tables (a quarter of an hour)
	@rm -rf build/coverage
	@mkdir -p build/coverage/package/torch_manualbp build/coverage/fast
	@echo "==> building with line counts"
	@$(MAKE) $(DRIVERS:%=build/coverage/%) build/coverage/pool $(EMULATED:%=build/coverage/%)
	@cd build/coverage/fast && $(CXX) -std=c++17 -O3 -fPIC -c $(abspath $(KERNELS))
	@ln -s $(abspath $(wildcard torch_manualbp/[!_]* torch_manualbp/_[!C]*)) build/coverage/package/torch_manualbp
	@torch=$$($(RUN) python -c 'import os, torch; print(os.path.dirname(torch.__file__))' ) && \
	  $(CXX) -std=c++17 $(COUNTED) -fPIC -shared -DTORCH_TARGET_VERSION=0x020A000000000000 -DTORCH_STABLE_ONLY \
	  -isystem $$torch/include csrc/ops.cpp $(filter-out $(KERNELS),$(wildcard csrc/cpu/*.cpp)) build/coverage/fast/*.o \
	  -L$$torch/lib -ltorch -ltorch_cpu -o build/coverage/package/torch_manualbp/_C.abi3.so
	@echo "==> running"
	@$(call on_every_level,build/coverage/kernels 1000)
	@$(call on_every_level,build/coverage/kernels threads)
	@$(call on_every_level,build/coverage/network 2)
	@build/coverage/pool 5
	@for program in $(EMULATED:%=build/coverage/%); do $$program || exit 1; done
	@$(RUN) PYTHONPATH=build/coverage/package coverage run $(VENV)/bin/pytest $(ARGS) \
	  --deselect tests/test_packaging.py::test_binary_is_small --deselect tests/test_packaging.py::test_binary_runs_with_old_glibc
	@$(RUN) coverage combine -q
	@$(RUN) coverage report
	@$(RUN) gcovr $(GCOVR) build/coverage
	@for level in $(LEVELS); do echo "kernels, level $$level:"; \
	  $(RUN) gcovr $(GCOVR) build/coverage/csrc/cpu/kernels/$$level.gcda | grep -- -inl.h; done

wheel: $(VENV)/.ready  ## build dist/torch_manualbp-*-cp310-abi3-*.whl
	@rm -rf build/lib* build/bdist*  # setuptools would include deleted modules
	@mkdir -p dist && rm -f dist/*.whl
	@$(RUN) python -m pip wheel -qq . --no-deps --no-build-isolation --wheel-dir dist
	@ls -l dist/*.whl

sdist-check: $(VENV)/.ready  ## build a source archive, and from it wheels with and without pip's build isolation
	@rm -rf build/sdist
	@$(RUN) python setup.py -q sdist --dist-dir build/sdist
	@$(RUN) python -m pip wheel -qq build/sdist/*.tar.gz --no-deps --wheel-dir build/sdist/isolated
	@$(RUN) python -m pip wheel -qq build/sdist/*.tar.gz --no-deps --no-build-isolation --wheel-dir build/sdist/not-isolated
	@ls -l build/sdist/*.tar.gz build/sdist/*/*.whl

wheel-check: wheel $(VENV)/.audit  ## the wheel against CPython's stable ABI and glibc 2.28; dist/audited: tagged for it
	@rm -rf dist/audited
	@$(RUN) .ci/audit-wheel dist/*.whl dist/audited

wheel-aarch64: $(VENV)/.ready  ## the wheel for aarch64, cross-compiled, tested with an emulated torch (.ci/wheel-aarch64; 2 GB)
	@VENV=$(VENV) .ci/wheel-aarch64 $(ARGS)

matrix: wheel  ## the wheel under CPython 3.10 to 3.13 and several torch: build/matrix.md (an hour or more, gigabytes)
	@$(RUN) python .ci/matrix.py dist/*.whl --torch-flags='$(TORCH_FLAGS)' $(ARGS)

release-check:  ## try HEAD as a release, in a clone of it; dist/ then holds what was checked (REHEARSAL=1: no release yet)
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' TORCH_FLAGS='$(TORCH_FLAGS)' ARGS='$(ARGS)' REHEARSAL='$(REHEARSAL)' .ci/release-check

clean:  ## remove everything that make created
	@[ ! -e $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	@rm -rf build dist *.egg-info torch_manualbp/_C*.abi3.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +

# The kernels do not depend on torch, and network.h needs little of it (tests/csrc/torch_stub), so sanitizers run them
# in separate programs. Exit status 77: this machine does not support the level.
# bf16_model runs the code of avx512_bf16 without its instruction (tests/csrc/bf16_model.cpp).
on_every_level = for level in $(LEVELS) bf16_model; do MANUALBP_ISA=$$level $(1) || [ $$? = 77 ] || exit 1; done
# The drivers by an emulator, and the level that they must choose there unless one is forced.
emulated = for run in "kernels 40" "network 1"; do \
  said=$$(unset MANUALBP_ISA; $(1) build/$@/$$run); echo "$$said"; [ "$$said" = "$(2): $${run\#* } passed" ] || exit 1; done
KERNELS := csrc/cpu/isa.cpp $(wildcard csrc/cpu/kernels/*.cpp)
COUNTED := -O0 -w --coverage -fprofile-update=atomic
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
# Unoptimised, because these checks take most of the time of a compilation; but the passes run on the default kernels.
build/asan/%: DRIVER_FLAGS := -O0 $(ASAN)
build/asan/csrc/cpu/kernels/default.o build/asan/tests/csrc/bf16_model.o: DRIVER_FLAGS := $(ASAN)
build/tsan/%: DRIVER_FLAGS := -fsanitize=thread
# The programs are static, so that the emulator needs no libraries. Only kernels are optimised as in setup.py, because
# g++ 12 for Arm crashes on the drivers at -O3.
build/aarch64/% build/nehalem/%: DRIVER_FLAGS := -static
build/aarch64/csrc/% build/nehalem/csrc/%: DRIVER_FLAGS := -static -O3
build/aarch64/%: CXX := aarch64-linux-gnu-g++
build/coverage/%: DRIVER_FLAGS := $(COUNTED)
# zig brings clang and the headers of macOS. csrc is compiled with torch's headers and the flags of setup.py.
build/macos/%: CXX := ZIG_GLOBAL_CACHE_DIR=build/macos/cache $(VENV)/bin/python -m ziglang c++ -target aarch64-macos
build/macos/%: DRIVER_FLAGS := -O0 -Werror
build/macos/csrc/%: HEADERS = -isystem $(shell $(VENV)/bin/python -c \
  'from importlib.util import find_spec; print(*find_spec("torch").submodule_search_locations)')/include
build/macos/csrc/%: DRIVER_FLAGS := -O3 -g0 -fPIC -fvisibility=hidden -Wno-unused-parameter -Werror -include csrc/glibc.h \
  -DTORCH_TARGET_VERSION=0x020A000000000000 -DTORCH_STABLE_ONLY
HEADERS := -Itests/csrc/torch_stub
define drivers
build/$(1)/%.o: %.cpp $(filter %.h,$(SOURCES)) $(shell find tests/csrc -name '*.h')
	@mkdir -p $$(@D)
	@$$(CXX) -std=c++17 -O1 -g1 -DMBP_BF16_MODEL $$(DRIVER_FLAGS) -Wall -Wextra $$(WIDE_VECTORS) $$(HEADERS) -c $$< -o $$@
$(DRIVERS:%=build/$(1)/%): $(KERNELS:%.cpp=build/$(1)/%.o) build/$(1)/tests/csrc/bf16_model.o
build/$(1)/tests/csrc/bf16_model.o: WIDE_VECTORS := -Wno-psabi
$(DRIVERS:%=build/$(1)/%) build/$(1)/pool: build/$(1)/%: build/$(1)/tests/csrc/%.o build/$(1)/csrc/cpu/pool.o
	@$$(CXX) $$(DRIVER_FLAGS) $$^ -o $$@ -ldl -pthread
endef
$(foreach kind,asan tsan aarch64 macos nehalem coverage,$(eval $(call drivers,$(kind))))

# Each CUDA kernel runs in a program that emulates it.
EMULATED := $(patsubst tests/csrc/%.cpp,%,$(wildcard tests/csrc/test_*.cpp))
GCOVR := --root . --filter csrc/ --merge-lines --exclude-lines-by-pattern '.*__builtin_trap.*' \
  --gcov-executable $(or $(GCOV),gcov)
$(EMULATED:%=build/coverage/%): build/coverage/%: build/coverage/tests/csrc/%.o
	@$(CXX) --coverage $< -o $@ -pthread

# venv installs pip last, so an interrupted set-up is repeated.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: Python >= 3.10 is needed, but '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "make: name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments: its venv module is missing" >&2; \
	  echo "make: install it (on Debian and Ubuntu the package is python3-venv)" >&2; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# Some environments have a setuptools or pip too old for editable builds. ninja compiles files in parallel, but is
# optional.
$(TORCH_STAMP): | $(VENV)/bin/pip
	@echo "==> installing $(TORCH)"
	@$(PIP) $(TORCH_FLAGS) '$(TORCH)'
	@$(PIP) 'pip>=22' 'setuptools>=77'
	@$(RUN) command -v ninja >/dev/null || $(PIP) ninja 2>/dev/null || true
	@rm -f $(VENV)/.torch-*
	@touch $@

# If only csrc changed, compile only what depends on the changed files.
$(VENV)/.ready: $(TORCH_STAMP) pyproject.toml setup.py torch_manualbp/__init__.py $(SOURCES) \
                $(if $(wildcard $(BINARY)),,FORCE)
	@echo 'int main() { if (int i = 0; i == 0) return i; }' | $${CXX:-c++} -std=c++17 -fsyntax-only -x c++ - || { \
	  echo "make: a C++17 compiler is needed, but '$${CXX:-c++}' is none: install g++ or clang++, or name one: make CXX=..." >&2; \
	  exit 1; }
	@echo "==> building torch_manualbp"
	@mkdir -p build
	@$(if $(filter-out csrc/%,$?),$(INSTALL),$(REBUILD))
	@touch $@

# Installs the packages of an extra: the pinned linters, the peers of the benchmarks, and the tools for the site,
# coverage, wheels and releases.
EXTRAS := lint bench docs notebooks coverage audit release zig
$(EXTRAS:%=$(VENV)/.%): $(VENV)/.%: pyproject.toml | $(VENV)/.ready
	@echo "==> installing the extra '$*'"
	@$(PIP) $$($(VENV)/bin/python -c 'from importlib.metadata import requires; \
	  print(*(r.split(";")[0] for r in requires("torch_manualbp") if "$*" in r.partition(";")[2]))')
	@touch $@
