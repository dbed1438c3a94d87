# Targets: setup demo check test test-slow bench. Everything happens inside .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One BLAS/OpenMP thread per process unless told otherwise: the tests start several processes on few cores.
TEST_ENV := OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0

.PHONY: setup demo lint check test test-slow bench clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	@command -v c++ >/dev/null || { echo "error: a C++ compiler is needed (Debian: apt-get install g++)"; exit 2; }
	@echo "installing into $(VENV) (several minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' 2> >(grep -v '^WARNING: Location' >&2)
	@echo "byte-compiling and building DeepSpeed's CPU operator"
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@$(BIN)/python -c "from rddm_dist.training.engine import build_operators; build_operators()" > $(VENV)/build.log 2>&1 || { tail -5 $(VENV)/build.log; exit 1; }
	@touch $@
	@echo "ready: $(BIN)/rddm --help"

demo: setup
	@$(BIN)/rddm demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Lint, types and unit tests.
check: lint
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 tests/unit

# Everything that needs no GPU, within 15 minutes on 2 cores: unit tests side by side, then those with processes of
# their own, two files at a time.
test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu" tests/unit
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu" tests/e2e tests/distributed

test-slow: setup
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not gpu"

bench: setup
	@for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) runs
