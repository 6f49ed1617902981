# make setup | demo | test | check | bench | console | clean. Everything goes into .venv; PYTHON=... chooses the interpreter.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ray tools check bench console clean
.DELETE_ON_ERROR:

VENV := .venv
DATA ?= data
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
CANDIDATES := $(PYTHON) python3.11 python3.12 python3.13 python3
# Nothing is compiled when it is installed, as most of it is never imported; Python compiles, and keeps, what is imported.
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt
export PYTHONDONTWRITEBYTECODE :=

help:
	@echo "make setup  install into .venv (done by the others when needed)"
	@echo "make demo   train on real solar cells, find the broken ones, write demo/index.html"
	@echo "make test   run the tests; make test-ray those that need Ray"
	@echo "make check  formatting, lint and types"
	@echo "make bench  measure the numbers of the README, on the four products below DATA=folder"
	@echo "make console  build the pages of the service anew (needs Node; the build is committed)"
	@echo "make clean  remove what these made, but not .venv"

setup: $(STAMP)

# The stamp is written last: an installation that was cut off is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV), about a minute"
	@test -x $(BIN)/python || for python in $(CANDIDATES); do \
	    if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then echo "$$python -m venv $(VENV)"; $$python -m venv --clear $(VENV) && break; fi; done; \
	test -x $(BIN)/python || { echo "error: no Python 3.11 or newer with venv found; install one or call make PYTHON=/path/to/python" >&2; exit 1; }
	$(INSTALL) torch
	$(INSTALL) --editable '.[demo,dev]'
	@touch $@

demo: setup
	$(BIN)/gladad demo -o demo

# One process more than there are cores: some tests wait for a browser, a server or a program that is ended.
test: setup tools
	$(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 4 --dist worksteal

# Ray takes half a minute to install, and its test a minute.
test-ray: setup
	$(INSTALL) --editable '.[ray]'
	$(BIN)/python -m pytest tests/test_cluster.py

# What tests use besides Python packages.
tools:
	@scripts/install_test_tools.sh
	@scripts/install_node_modules.sh

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: setup
	$(BIN)/gladad benchmark four_products --data $(DATA) -o runs/four_products

console:
	cd console && npm ci --no-audit --no-fund && npm run check && npm run build

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +
