# Everything a user or a machine runs. Needs Python 3.11 to 3.13 and make; the rest goes into .venv.
#   make quickstart                    train and judge all models of the paper on the embedded world
#   make test                          the normal suite
#   make test PYTHON=python3.12        another interpreter (after make clean)
#   make test ARGS='tests/losses -x'   part of the suite

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
WORKDIR ?= runs/quickstart

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Large arrays in large pages (glibc 2.35 and newer; no other system reads it): a CPU otherwise
# spends a tenth of a training step on clearing small ones.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
SOURCES := instruct_jax experiments configs tests

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

quickstart: $(VENV)/.installed  ## train and judge all models of the paper on the embedded world
	$(BIN)/python experiments/quickstart.py --workdir $(WORKDIR) --host_devices 2 $(ARGS)

test: $(VENV)/.installed-dev  ## run the normal test suite
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.installed-dev  ## run the tests that take minutes each
	XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(VENV)/.installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/.installed-dev  ## put the sources into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and the caches (runs/ stays)
	rm -rf $(VENV) .cache .hypothesis .pytest_cache .ruff_cache build dist *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are the installs: a change of pyproject.toml makes them stale, nothing else does.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing instruct-jax into $(VENV) (about a minute the first time) ..."
	$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing instruct-jax and its development tools into $(VENV) ..."
	$(PIP) install --quiet -e '.[dev]'
	@touch $(VENV)/.installed $@
