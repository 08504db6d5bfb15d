# make demo    set up, then a diffusion language model answers in the terminal
# make test    set up, then every test: Python, C++, CUDA compile check
# make lint    ruff, mypy          make format   ruff, clang-format
# make sanitize  the CUDA kernels under compute-sanitizer; needs a GPU
# make clean   remove what was built (the environment in .venv stays)

# The active python if it has torch >= 2.11 and pip may install into it (a system python often
# says no, PEP 668); otherwise the one of .venv, which is made on demand.
FIND_PYTHON := import importlib.metadata, importlib.util, os, sys, sysconfig; \
  torch = tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2]); \
  marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"); \
  is_managed = sys.prefix == sys.base_prefix and os.path.exists(marker); \
  has_pip = importlib.util.find_spec("pip") is not None; \
  is_new = torch >= (2, 11) and sys.version_info >= (3, 10); \
  print(sys.executable if is_new and has_pip and not is_managed else "")
VENV := $(CURDIR)/.venv
PYTHON := $(or $(shell python3 -c '$(FIND_PYTHON)' 2>/dev/null),$(VENV)/bin/python)
export PATH := $(dir $(PYTHON)):$(PATH)

# One stamp per python, so that changing the environment installs into the new one.
INSTALLED := build/setup$(PYTHON)/installed
RUNTIME := build/setup$(PYTHON)/runtime
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CUDA_SOURCES := $(filter csrc/cuda/%.cu,$(SOURCES))

DEMO_PROMPT := Sam has 84 apples. Then Sam buys 5 crates with 5 apples in each crate. Then Sam \
gives away 17 apples. How many apples does Sam have now?

.PHONY: demo test lint format clean check-cuda sanitize
.DELETE_ON_ERROR:

demo: $(RUNTIME)
	elastic-cache generate --model tiny --prompt "$(DEMO_PROMPT)"

test: $(INSTALLED)
	python -m pytest
	@$(MAKE) --no-print-directory check-cuda
	$(CONFIGURE)
	cmake --build build/cpp
	ctest --test-dir build/cpp --output-on-failure

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy

format: $(INSTALLED)
	ruff check --fix .
	ruff format .
	python -m pip install --quiet clang-format
	find csrc examples tests -regex '.*\.\(h\|cpp\|cu\|cuh\)' | xargs clang-format -i

clean:
	rm -rf build python/*.egg-info python/elastic_cache/_ops*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# --- set-up ----------------------------------------------------------------------------------
# Without build isolation, because the operators must be built with the torch they run with.
# torch is pinned where it is installed here: an open requirement pulls gigabytes of CUDA packages.
TORCH := $(if $(filter $(VENV)/%,$(PYTHON)),$(VENV)/torch-installed)

$(INSTALLED): $(SOURCES) $(TORCH)
	python -m pip install --quiet setuptools wheel ninja
	python -m pip install --quiet --no-build-isolation -e ".[test]"
	@mkdir -p $(@D) && touch $@ $(RUNTIME)

# Without what only tests need, which is a hundred packages.
$(RUNTIME): $(SOURCES) $(TORCH)
	python -m pip install --quiet setuptools wheel ninja
	python -m pip install --quiet --no-build-isolation -e .
	@mkdir -p $(@D) && touch $@

$(VENV)/torch-installed:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "elastic_cache needs python3 to be Python 3.10 or later: install one"; exit 1; }
	@python3 -m venv $(VENV) || \
	  { echo "python3 cannot make a virtual environment: run apt-get install python3-venv"; exit 1; }
	$(VENV)/bin/python -m pip install --quiet torch==2.13.0
	@touch $@

# --- C++ libraries and tests; every CUDA kernel compiles, with or without a GPU -----------------
CONFIGURE := cmake -S . -B build/cpp -G Ninja -D Python3_EXECUTABLE=$(PYTHON)

ifeq ($(CUDA_SOURCES),)
check-cuda:
	@echo "CUDA compile check skipped: there are no .cu files in csrc/cuda"
else ifeq ($(shell command -v nvcc),)
check-cuda:
	@echo "CUDA compile check skipped: nvcc is not installed"
else
check-cuda: $(INSTALLED)
	$(CONFIGURE) -D ELASTIC_CACHE_CUDA=on
	cmake --build build/cpp --target cuda_objects
	@echo "CUDA compile check passed: $(words $(CUDA_SOURCES)) files for sm_80 and sm_90a"
endif

# --- CUDA: memory errors and races, on a machine with a GPU and a build with CUDA kernels --------
sanitize: $(INSTALLED)
	$(CONFIGURE) -D ELASTIC_CACHE_CUDA=on
	cmake --build build/cpp --target attention_probe
	python tests/sanitize.py --probe build/cpp/tests/cuda/attention_probe
