# The verbs of the project. Each sets up what it needs in $(VENV): torch if it isn't there, the package, the extension.
#   make demo | test | lint | format | bench | doctor | compile-gpu | clean
#   make gpu: environment, build, tests, compute-sanitizer and benchmarks on one GPU, in under nine minutes. It uses the
#   packages of $(PYTHON), where torch with CUDA, triton, ninja, pybind11, pytest, rich and typer must be, and no network.
# Before the first: a C++ compiler, make, and Python 3.10 or later with its headers and venv module
#   (Debian, Ubuntu: apt install g++ make python3-dev python3-venv).

PYTHON ?= python3
VENV ?= .venv
# What pip installs where there is no torch. It is looked for at TORCH_INDEX too, whose CPU builds pip prefers;
# packages of CUDA come only with ALLOW_CUDA=1.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Arguments for the command: make test ARGS="-k gru", make demo ARGS=--full, make bench ARGS=recurrent.
ARGS ?=
# Processes that run the tests, whole files each; 0: this one alone.
WORKERS ?= 2

# Without it both OpenMP threads were seen on one core.
export OMP_PROC_BIND ?= true

BIN := $(VENV)/bin
FIND_CXX := find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \)

.PHONY: demo test bench gpu lint format doctor build clean compile-gpu

demo: $(VENV)/.demo build
	$(BIN)/seqattn demo $(ARGS)

# Threads are not bound: those of the processes would be bound to the same cores.
test: export OMP_PROC_BIND := false
test: $(VENV)/.dev build
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

bench: $(VENV)/.bench build
	$(BIN)/python -m benchmarks.run $(or $(ARGS),recurrent)

gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

doctor: $(VENV)/.package build
	$(BIN)/seqattn doctor

# CUDA sources where nvcc is, Triton kernels where Triton is.
compile-gpu: $(VENV)/.package
	$(BIN)/python .ci/compile_gpu.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(FIND_CXX) | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(FIND_CXX) | xargs $(BIN)/clang-format -i

# ninja compiles what changed; SEQATTN_BUILD=auto|cpu|none says what to build.
build: $(VENV)/.package
	$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q 'pip>=23.2' 'setuptools>=77' wheel ninja 'pybind11>=2.13' numpy
	ALLOW_CUDA=$(ALLOW_CUDA) $(BIN)/python .ci/install_torch.py '$(TORCH)' '$(TORCH_INDEX)'
	touch $@

# The package is installed in place and without the extension, which `build` adds: a rebuild is then incremental.
$(VENV)/.package: pyproject.toml setup.py | $(VENV)/.torch
	SEQATTN_BUILD=none $(BIN)/pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.package
	SEQATTN_BUILD=none $(BIN)/pip install -q --no-build-isolation -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache
	rm -f seqattn_kernels/*.so
