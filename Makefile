# make quickstart   fine-tune a real pretrained model in int8 with LoRA, and export it (about a minute)
# make test         run the tests
# make test-all     the same: the matrix of methods, models and tasks is short enough to be run whole each time
# make models       run that matrix, and write docs/models.md from it
# make check        ruff and mypy
# make bench        the layer benchmark
# make gpu-check    on a machine with a GPU, which needs no network: build for it, test, measure (ARGS="tests": one part)
# make clean        remove what these have made
#
# Each makes .venv when it is not there. PYTHON=python3.12 make ... takes another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE = 1
# DeepSpeed compiles what it needs when it is first used.
export DS_BUILD_OPS = 0

# What the extension and the metadata are built from: a change installs again.
SOURCES := pyproject.toml constraints.txt tests/cuda-requirements.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: quickstart test test-all models check bench gpu-check clean

quickstart: $(VENV)/.quickstart
	$(BIN)/pyadapt quickstart $(ARGS)

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: test

models: $(VENV)/.test
	$(BIN)/python tests/matrix_page.py

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.layer $(ARGS)

# With the packages that are there: nothing is installed, and no .venv is made.
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(ARGS)

$(VENV)/.made:
	$(PYTHON) scripts/check_prerequisites.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch -c constraints.txt
	touch $@

# Editable, so that an edited Python file needs no new installation. The emulated instruction sets let a machine without
# AVX-512 run that code's tests; a release is built without them.
$(VENV)/.test: $(VENV)/.made $(SOURCES)
	$(PIP) install --quiet --editable ".[test]" -c constraints.txt --config-settings=cmake.define.PYADAPT_EMULATED_ISA=ON
	$(PIP) install --quiet --no-deps -r tests/cuda-requirements.txt
	touch $@

# An environment that has the tests' packages has the quick start's too.
$(VENV)/.quickstart: $(VENV)/.made $(SOURCES)
	test -e $(VENV)/.test || $(PIP) install --quiet --editable ".[quickstart]" -c constraints.txt
	test ! -e $(VENV)/.test || $(MAKE) $(VENV)/.test
	touch $@

clean:
	rm -rf $(VENV) build quickstart-out .pytest_cache .ruff_cache .mypy_cache
