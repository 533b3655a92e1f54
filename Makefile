# Commands for a machine with python3 (3.10 or later) and make:
#
#   make demo      install into .venv, merge a small trained model, and show how much survives
#   make test      install into .venv with the development tools, then lint, check types and run every test
#   make coverage  the same installation, then which lines and branches the tests run (an hour on two cores)
#   make bench     the same installation, then time and memory next to other tools (BENCH=--small for a quick look)
#
# and for maintainers:
#
#   make release  build wheel and sdist, install the wheel into a new environment, run its demo, audit and list what it needs
#
# PYTHON=python3.12 chooses another interpreter, VENV=dir another folder, PIP="uv pip" another installer, JOBS=4 the number
# of processes that run tests. torch is installed first, in the version of constraints.txt; if .venv already has a build of
# that version (for a CPU, for instance), it is kept.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP ?= $(BIN)/python -m pip
PYTEST ?= $(BIN)/python -m pytest
JOBS ?= 2
INSTALL = $(PIP) install --quiet -c constraints.txt

# Small matrices gain nothing from many threads, and a container often shows more cores than it may use.
export OMP_NUM_THREADS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export GPTQMODEL_CPU_WORKERS ?= 2  # gptqmodel 7.6 does not start on two cores otherwise
export PIP_NO_INPUT = 1

.PHONY: demo test browser coverage bench dist audit sbom release clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/qmerge demo

test: $(VENV)/installed-dev browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/style_report.py --check
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" -n $(JOBS) --dist loadfile
	OMP_NUM_THREADS=1 $(PYTEST) -m slow -n $(JOBS) --dist loadfile
	! command -v nvidia-smi >/dev/null || QMERGE_TEST_GPU=1 $(PYTEST) tests/rounding/test_gpu.py

# The HTML report is tested in Chromium. Where it is absent and cannot be installed, those tests are skipped.
browser:
	-@command -v chromium google-chrome >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1

# Tests with a time limit may fail here, because tracing is slow: whether tests pass is the business of `make test`.
coverage: $(VENV)/installed-dev
	rm -f .coverage .coverage.*
	-OMP_NUM_THREADS=1 COVERAGE_CORE=ctrace $(BIN)/python -m coverage run -m pytest -m "not slow" -n $(JOBS) --dist loadfile
	-COVERAGE_CORE=ctrace $(BIN)/python -m coverage run -m pytest -m slow
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/speed.py $(BENCH)

# --- a release: build/ has the environment, the tools and the list of dependencies, dist/ what is published ---

RELEASE := build/release
TOOLS := build/tools/bin

release: audit sbom
	cd build && release/bin/qmerge --version && release/bin/qmerge demo

# Without --strict, pip-audit ends with 0 when it cannot look up a package. It knows no local versions (2.13.0+cpu).
audit: $(RELEASE)/installed
	$(RELEASE)/bin/python -m pip list --format=freeze --exclude qmerge --exclude pip > build/audited.txt
	sed -i 's/+.*//' build/audited.txt
	$(TOOLS)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r build/audited.txt

sbom: $(RELEASE)/installed
	$(TOOLS)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-file build/qmerge.cdx.json $(RELEASE)/bin/python

dist: build/tools/installed
	rm -rf dist
	$(TOOLS)/python -m build --outdir dist
	$(TOOLS)/python -m twine check --strict dist/*

# The last line removes the wheel's path from the metadata, which would be in the list of dependencies.
$(RELEASE)/installed: dist
	rm -rf $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet -c constraints.txt torch
	$(RELEASE)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	$(RELEASE)/bin/python -m pip install --quiet --force-reinstall --no-deps --no-index --find-links dist qmerge
	touch $@

build/tools/installed:
	$(PYTHON) -m venv build/tools
	$(TOOLS)/python -m pip install --quiet build twine pip-audit cyclonedx-bom
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e '.[dev]'
	-$(PIP) install --quiet --no-deps --only-binary :all: auto-gptq==0.7.1  # tests compare with it; it has wheels for Python 3.8 to 3.11
	touch $@

clean:
	rm -rf $(VENV) build dist
