# Every target sets itself up: `make quickstart` and `make test` work from a bare checkout with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread per process: with tiny models more threads only wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1
# What DeepSpeed compiles at its first launch: one per environment, or two environments undo each other's every time.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: setup quickstart test test-slow test-distributed test-faults test-exactness test-compat test-wheel bench gpu-check \
	docs docs-check lint types format clean

setup: $(VENV)/.ready

# For pip: `PIP_OPTIONS="..."` may name another index. Where there is no GPU, name the one of PyTorch's CPU builds: on
# most indexes the pinned torch is a CUDA build of several gigabytes.
PIP_OPTIONS ?=

# torch first and by its exact pin: whichever build of it the index has, nothing after it exchanges it for another.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PIP_OPTIONS) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet $(PIP_OPTIONS) --constraint constraints.txt --editable '.[dev]'
	touch $@

# What the quickstart needs and no more: neither DeepSpeed nor the tools of development.
$(VENV)/.runs: pyproject.toml constraints.txt
	test -e $(VENV)/.ready || $(PYTHON) -m venv $(VENV)
	test -e $(VENV)/.ready || $(BIN)/pip install --quiet --upgrade pip
	test -e $(VENV)/.ready || $(BIN)/pip install --quiet $(PIP_OPTIONS) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	test -e $(VENV)/.ready || $(BIN)/pip install --quiet $(PIP_OPTIONS) --constraint constraints.txt --editable '.[quickstart,report]'
	touch $@

# One process on a CPU, with what accelerate would otherwise say that it has assumed, and no traceback of its own.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu

quickstart: $(VENV)/.runs
	@PYTHONWARNINGS=ignore::FutureWarning $(LAUNCH) recipes/quickstart.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Two processes on each backend. One launch at a time, but the few of other files beside them: starting up leaves room.
test-distributed: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m distributed --durations=0

# Features against TRL's own gradient, every architecture, adapter and setting; goes on where the last one stopped.
test-exactness: setup
	$(BIN)/python scripts/exactness.py

test-faults: setup
	$(BIN)/python tests/faults/fault_injection.py
	$(BIN)/python tests/faults/disk_faults.py

# Default sizes, about two minutes each; peers are measured where they are installed (docs/cost.md).
bench: setup
	for name in capture_cost fidelity scoring_scale; do \
		$(BIN)/python benchmarks/$$name.py --json outputs/bench/$$name.json || exit 1; done

# What the package does on a GPU, in at most eight minutes: docs/gpu_check.md. For some parts, GPU_CHECK="--parts features".
GPU_CHECK ?=

gpu-check: setup
	$(BIN)/python benchmarks/gpu_check/check.py $(GPU_CHECK)

# Every minor release of TRL, and the oldest of everything, each in a fresh environment; goes on where it stopped.
test-compat: setup
	$(BIN)/python scripts/compatibility.py

# Build the wheel, install it into a fresh environment, use it.
test-wheel: setup
	$(BIN)/python scripts/wheel.py

# Run every command of README and docs, and check that generated pages are current.
docs-check: setup
	$(BIN)/python scripts/configuration_reference.py --check
	$(BIN)/python scripts/api_reference.py --check
	$(BIN)/python scripts/docs_check.py

docs: setup
	$(BIN)/python scripts/configuration_reference.py
	$(BIN)/python scripts/api_reference.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
