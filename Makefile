# Everything a person or CI runs. PYTHON is the environment's interpreter, PROCESSES run tests side by side.
PYTHON ?= .venv/bin/python
PROCESSES ?= 2
BIN = $(dir $(PYTHON))
STAMP = .venv/.installed

.PHONY: setup check format train test test-slow test-system test-gpu test-kernels test-newest test-oldest mutants

# A fresh environment, unless PYTHON names one that exists. constraints.txt pins what was tested.
ifeq ($(PYTHON),.venv/bin/python)
setup: $(STAMP)
else
setup:
endif

$(STAMP): pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

check: setup
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(BIN)mypy
	$(BIN)lint-imports --no-logo
	$(BIN)python tools/structure.py

format: setup
	$(BIN)ruff format .
	$(BIN)ruff check --fix .

train: setup
	$(BIN)llmeff train --recipe default

# A file's tests share what they set up, and so a process.
test: setup check
	$(BIN)python -m pytest -n $(PROCESSES) --dist loadfile

test-slow: setup
	$(BIN)python -m pytest -m "slow and not gpu and not system"

test-system: setup
	$(BIN)python -m pytest -m "system"

test-gpu: setup
	$(BIN)python -m pytest -m "gpu"

# Kernels of GPUs without one: Triton interprets them. It is pinned here, since torch for CUDA brings the one of its own.
test-kernels: setup
	$(BIN)python -m pip install --quiet --constraint constraints.txt --editable ".[fla]" triton==3.9.0
	TRITON_INTERPRET=1 $(BIN)python -m pytest tests/attention/test_kernels.py

# What pyproject.toml allows, in fresh environments: the newest of all but torch, which TORCH names, and the lowest.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
LANE_TESTS ?= tests/models tests/attention tests/optim tests/parallel tests/data tests/core tests/record tests/run/test_loop.py \
	tests/test_strategies.py
LANE_ARGS ?=

define lane
	rm -rf .venv-$(1)
	python3 -m venv .venv-$(1)
	$(2) > .venv-$(1)/constraints.txt
	.venv-$(1)/bin/python -m pip install --quiet --no-compile --constraint .venv-$(1)/constraints.txt --editable ".[test]"
	.venv-$(1)/bin/python -m pip freeze --exclude-editable
	.venv-$(1)/bin/python -m pytest -n $(PROCESSES) --dist loadfile $(LANE_TESTS) $(LANE_ARGS)
endef

test-newest:
	$(call lane,newest,echo "torch==$(TORCH)")

test-oldest:
	$(call lane,oldest,python3 tools/lower_bounds.py)

# Which mutants of the package the tests do not see: hours; goes on where it was stopped. ARGS=--known: seven patches, minutes.
mutants: setup
	$(BIN)python -m pip install --quiet --constraint constraints.txt --editable ".[mutants]"
	$(BIN)python -m tests.mutants.campaign --processes $(PROCESSES) $(ARGS)
