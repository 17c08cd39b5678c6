# The whole of the project's housekeeping. Needs Python 3.11 or newer, git and make; the rest goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
LEAST_PYTHON := (3, 11)

# Nothing is fetched and nothing is reported while the project runs.
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check format lint types imports docs clean

help:
	@echo 'make demo    a whole federation on this machine'
	@echo 'make test    all tests, the slow ones included'
	@echo 'make check   the whole gate: format, lint, types, imports, docs, tests'
	@echo 'make docs    the documentation, into docs/_build'
	@echo 'make clean   remove what builds and tests leave behind; .venv and runs stay'
	@echo 'Another Python than python3: make PYTHON=python3.12 ...'

demo: $(DEMO)
	$(BIN)/confide simulate demo

# One thread per test process: with one process per core, more would only stand in each other's way. Work is stolen, for
# the last tests are those of real agents, which take long.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# The tests come last, so that their closing line is the last word.
check: format lint types imports docs test

format: $(DEV)
	$(BIN)/ruff format --check .

lint: $(DEV)
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

imports: $(DEV)
	$(BIN)/lint-imports

docs: $(DEV)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# `dev` holds all that `demo` needs, so it counts for both.
$(DEV): pyproject.toml
	$(call install,dev)
	touch $(DEMO) $@

$(DEMO): pyproject.toml
	$(call install,demo)
	touch $@

define install
@command -v $(PYTHON) >/dev/null || { echo 'There is no $(PYTHON). Name the Python to use: make PYTHON=python3.12 ...' >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.version_info >= $(LEAST_PYTHON) or sys.exit("$(PYTHON) is Python %d.%d; Confide needs 3.11 or newer. Name another: make PYTHON=python3.12 ..." % sys.version_info[:2])'
$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(1)]'
endef

clean:
	rm -rf build dist confide.egg-info docs/_build docs/reference/generated
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find common client server simulations tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
