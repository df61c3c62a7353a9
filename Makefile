# `make demo` and `make test` need nothing but make and Python 3.11 or newer: the first of them builds
# a virtual environment in .venv with the tested versions of constraints.txt.

PYTHON ?= python3
DEMO_STEPS ?=
DEMO_OUTPUT ?= demo-output
DEMO_SEED ?= 0
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Nothing here loads from a hub, and an attempt to is an error rather than a wait.
export HF_HUB_OFFLINE := 1

# Threads wait without spinning: on cores shared with other work, spinning made a step of the demo
# several times slower.
demo test support: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test support check format bench hooks clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train, evaluate, save and load an EPT prompt on a small frozen encoder"
	@echo "make test     run all tests, in TEST_WORKERS processes"
	@echo "make support  run the tests of the support matrix and write docs/support.md"
	@echo "make check    ruff, ruff format --check, mypy"
	@echo "make format   let ruff mend and format the code"
	@echo "make bench    time everything against its peers; BENCH_ARGS=--quick: a smoke test"
	@echo "make hooks    install the pre-commit hooks into this clone"
	@echo "make clean    remove .venv and everything that was built or left by a run"

install: $(STAMP)

# torch comes first and at its pinned version, so that no later step can choose another build of it.
$(STAMP): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ept-fast demo --output "$(DEMO_OUTPUT)" --seed "$(DEMO_SEED)" $(if $(DEMO_STEPS),--steps "$(DEMO_STEPS)")

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

support: $(STAMP)
	$(BIN)/python -m tests.support --workers $(TEST_WORKERS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/python -m pytest bench/ $(BENCH_ARGS)

hooks: $(STAMP)
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache demo-output
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
