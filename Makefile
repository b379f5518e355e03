# `make demo` and `make test` need nothing but Python ≥ 3.10: they make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format bench check-kernels clean

demo: $(VENV)/.runtime
	$(BIN)/bellbit demo demo-out

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "slow or not slow" --durations=5

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	@failed=0; for name in algorithm memory kernels inference training quality; do \
	    echo "benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || failed=1; done; exit $$failed

check-kernels: $(VENV)/.runtime
	scripts/check-kernels.sh sanitize
	scripts/check-kernels.sh neon
	PYTHON=$(BIN)/python scripts/check-kernels.sh fuzz

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist .mypy_cache .pytest_cache .ruff_cache
