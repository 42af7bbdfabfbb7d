# make quickstart   set up .venv, train the small recipe `nano` on real text, show samples, write a report (about 10 minutes)
# make test         set up the same .venv and run the tests (about 6 minutes on two cores)
#
#   make PYTHON=python3.12 …          another Python (3.11 or newer)
#   make PIP_FLAGS='--index-url …' …  whatever pip should be told, for instance an index with CPU-only wheels of torch
#
# A torch that the Python in use already has is kept when it is 2.11 or newer; otherwise the version in constraints.txt is
# installed. Nothing here needs git, a compiler or a GPU.

PYTHON    ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=

VENV  := .venv
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready-to-test

NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
HAS_TORCH  = import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))
WHERE_TORCH = import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])
WHERE_SITE = import sysconfig; print(sysconfig.get_path("purelib"))
INSTALL    = $(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) -c $(VENV)/constraints.txt

.PHONY: help quickstart test test-all lint types clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   train a small model on real text and talk to it (about 10 minutes)"
	@echo "make test         run the tests"
	@echo "make test-all     run them all, slow ones and those that need a GPU too"
	@echo "make lint types   ruff and mypy"
	@echo "make clean        remove .venv and caches (runs/ stays)"

quickstart: $(READY)
	@$(VENV)/bin/fathom quickstart

test: $(READY_TO_TEST)
	$(PY) -m pytest -q -m "not slow and not gpu and not dist and not browser" $(PYTEST_FLAGS)

test-all: $(READY_TO_TEST)
	$(PY) -m pytest -q $(PYTEST_FLAGS)

lint: $(READY_TO_TEST)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY_TO_TEST)
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -not -path './runs/*' -exec rm -rf {} +

# --- the virtual environment -----------------------------------------------------------------------------------------

$(PY):
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "error: no '$(PYTHON)' found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || \
	  { echo "error: $$($(PYTHON) -V) is too old, fathom needs 3.11 or newer; name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	  echo "keeping the torch that $(PYTHON) already has"; \
	  $(PYTHON) -c '$(WHERE_TORCH)' >"$$($(PY) -c '$(WHERE_SITE)')/torch-already-there.pth"; \
	fi

# The constraints, without those on torch and what it is tied to when a suitable torch is there, so that pip leaves it alone.
$(VENV)/constraints.txt: constraints.txt | $(PY)
	@if $(PY) -c '$(HAS_TORCH)' 2>/dev/null; \
	  then grep -vE '^(torch|triton|setuptools|nvidia-|cuda-)' constraints.txt >$@; else cp constraints.txt $@; fi

$(READY): pyproject.toml $(VENV)/constraints.txt
	$(INSTALL) -e '.[cli,report]'
	@touch $@

$(READY_TO_TEST): $(READY)
	$(INSTALL) -e '.[dev]'
	@touch $@
