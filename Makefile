# Two commands on a machine that has python3 (3.10 or later) and make:
#
#   make demo   install into .venv, then merge a small trained model and show what survived
#   make test   install into .venv with the development tools, then lint, type-check and run every test
#
# PYTHON=python3.12 chooses another interpreter, VENV=dir another place, PIP="uv pip" another installer.
# torch goes first and from its pin in constraints.txt; a build of torch that is in .venv already is left as it is.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP ?= $(BIN)/python -m pip
PYTEST ?= $(BIN)/python -m pytest
INSTALL = $(PIP) install --quiet -c constraints.txt

# Small matrices gain nothing from many threads, and containers often show more cores than they may use.
export OMP_NUM_THREADS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export GPTQMODEL_CPU_WORKERS ?= 2  # it does not start on two cores otherwise
export PIP_NO_INPUT = 1

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/qmerge demo

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"
	$(PYTEST) -m slow

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e '.[dev]'
	-$(PIP) install --quiet --no-deps --only-binary :all: auto-gptq==0.7.1  # an oracle; wheels for Python 3.8 to 3.11
	touch $@

clean:
	rm -rf $(VENV)
