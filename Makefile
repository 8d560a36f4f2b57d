.PHONY: help install docs launchers quickstart paper notebooks package test test-quick test-nightly coverage test-lowest test-slurm gpu-check gpu-wheels lint check clean

PYTHON ?= python3
BIN := .venv/bin
# Each process computes on one core: as many processes as there are cores, and no more memory than four need.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist worksteal
# Else every process that tests start would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Made anew when the dependencies change.
.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("salve needs Python 3.10 or newer") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

install: .venv/.installed  ## make .venv and install the package with everything its tests need

launchers: install  ## install submitit, Ray and what corruptions need too, where pip finds them: without them their tests are skipped
	@for extra in slurm ray robustness; do \
	    $(BIN)/python -m pip install --quiet --editable ".[$$extra]" \
	        || echo "pip does not find all of salve[$$extra] here, so tests of what it brings are skipped."; \
	done

quickstart: install  ## understand and change a small classifier, in three minutes
	$(BIN)/salve

paper: install  ## the paper's figures and claims, with what this machine has (PAPER=--help)
	$(BIN)/python -m experiments.reproduce $(PAPER)

test: install  ## the whole test suite; eight minutes on two cores
	$(BIN)/python $(PYTEST)

test-quick: install  ## what is not marked slow, gpu, cluster or nightly; two minutes on two cores
	$(BIN)/python $(PYTEST) -m "not slow and not gpu and not cluster and not nightly"

test-nightly: install  ## Law 1 in a network of full size of each family, and in more small ones: half an hour
	$(BIN)/python $(PYTEST) -m nightly

# The notebooks are Python files in jupytext's percent format, so that changes can be reviewed, and linted. Pages and pictures are
# made from them, and lie in git beside them, where they can be read without a run.
NOTEBOOKS := $(basename $(notdir $(wildcard docs/notebooks/*.py)))
notebooks: export PYTHONWARNINGS := ignore
notebooks: export OMP_NUM_THREADS := 1
notebooks: export PATH := $(abspath $(BIN)):$(PATH)
notebooks: install  ## run the notebooks in docs/notebooks, and make their pages, with outputs and pictures: fifteen minutes
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	set -e; for name in $(NOTEBOOKS); do \
	    rm -rf docs/notebooks/$${name}_files; \
	    jupytext --quiet --to ipynb --output - docs/notebooks/$$name.py | jupyter nbconvert --log-level ERROR --stdin --execute \
	        --ExecutePreprocessor.timeout=1800 --to markdown --output-dir docs/notebooks --output $$name; \
	done

package: install  ## build the wheel and the sdist, install each in an environment of its own, and make a small run (PACKAGE=--dependencies)
	$(BIN)/python -m tests.package $(PACKAGE)

coverage: install  ## the tests of test-quick, and the share of lines that they run
	$(BIN)/python $(PYTEST) -m "not slow and not gpu and not cluster and not nightly" --cov --cov-report=term

# The oldest Python that is supported, where there is one.
LOWEST_PYTHON ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))
LOWEST_TESTS ?= tests

.venv-lowest/.installed: pyproject.toml tests/lowest.txt
	rm -rf .venv-lowest
	$(LOWEST_PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest/bin/python -m pip install --quiet --constraint tests/lowest.txt --editable '.[dev]'
	touch $@

test-lowest: .venv-lowest/.installed  ## the suite with the lowest versions that are allowed (LOWEST_TESTS=… for a part of it)
	.venv-lowest/bin/python $(PYTEST) $(LOWEST_TESTS)

test-slurm: install  ## sweeps on a real SLURM of one node, brought up for it (Debian or Ubuntu, as root)
	$(BIN)/python -m pip install --quiet --editable '.[slurm]'
	tests/cluster/slurm.sh $(BIN)/python -m pytest tests/cluster/test_slurm.py

# Another Python and its packages: GPU_PYTHON=python3. Where nothing can be downloaded, make gpu-wheels elsewhere and bring
# the folder along.
GPU_PYTHON ?= $(BIN)/python
OUT ?= outputs/gpu_check

gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),install)  ## tests and benchmarks on one GPU, in eight minutes; tables and log in OUT=outputs/gpu_check
	$(GPU_PYTHON) benchmarks/gpu_check.py --out $(OUT)

gpu-wheels: install  ## wheels that a GPU machine without a network may lack, in outputs/gpu_wheels
	$(BIN)/python benchmarks/gpu_check.py carry outputs/gpu_wheels

.venv/.docs: .venv/.installed
	$(BIN)/python -c 'import sys; sys.exit("the docs need Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# With --quiet, warnings would not break the build.
docs: .venv/.docs  ## the site of the docs in outputs/site, in half a minute; a link that leads nowhere is an error
	$(BIN)/python -m docs.tools.settings
	$(BIN)/python -m docs.tools.results
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "Open outputs/site/index.html; its search works only through a server: $(BIN)/python -m http.server --directory outputs/site"

lint: install  ## format, lint and types of the package, the experiments, the tests, the benchmarks and what makes the docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## everything a reviewer would check: format, lint, types, tests

clean:  ## remove the environment and caches; outputs/ stays
	rm -rf .venv .venv-lowest .mypy_cache .pytest_cache .ruff_cache
