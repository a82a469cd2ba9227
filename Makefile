# Every target works as the only command on a machine with Python and make: the first one that needs it builds .venv.
#   make quickstart | test | test-all | check | docs | dist | gpu | format | clean | help
# PYTHON=…    interpreter to build .venv with (default: the first below that runs, is >= 3.11 and has venv)
# PIP_ARGS=…  passed on to pip install
# CONSTRAINTS=…  the versions: constraints.txt, or constraints-lowest.txt (as .ci/lowest, with a VENV of its own)
# JOBS=…      test processes, one thread each
# TESTS=…     what pytest runs
# MINUTES=…   for `make gpu`: start no case that would end later

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
TESTS ?= tests
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt

CANDIDATES := python3.12 python3.11 python3 python
# A name on the PATH is not enough: version managers leave shims that do not run.
PYTHON ?= $(shell for p in $(CANDIDATES); do \
    $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

# --no-compile: Python compiles what it imports on first use, a small part of what is installed. It must then be let
# to keep that, or each process compiles again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINTS) $(PIP_ARGS)

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help quickstart test test-all check docs dist gpu format clean
help:
	@echo "make quickstart  train the embedded model in 4 bits with DPO; report and adapter in outputs/quickstart"
	@echo "make test        run the tests                    (TESTS=tests/test_x.py, JOBS=$(JOBS))"
	@echo "make test-all    these, then the long ones, then the known vulnerabilities of what is installed"
	@echo "make check       lint, formatting and types"
	@echo "make docs        the documentation as a site in outputs/site; a broken link is an error"
	@echo "make dist        wheel and sdist in dist, the same bytes wherever this commit is built"
	@echo "make gpu         measure what has no figure on this GPU, and write docs/performance.md   (MINUTES=9)"
	@echo "make format      apply the formatter and the lint fixes"
	@echo "make clean       remove .venv, outputs and caches"

quickstart: $(VENV)/.runtime
	$(BIN)/dpo-peft quickstart --output_dir outputs/quickstart

test: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(TESTS)

test-all: test
	$(PYTEST) -m slow $(TESTS)
	$(BIN)/python dev/audit.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Times in the archives are the commit's. Without isolation the pinned build backend is used.
dist: $(VENV)/.dev
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation
	cd dist && sha256sum *

gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_queue.py $(if $(MINUTES),--minutes $(MINUTES))

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a changed pyproject.toml or constraints file installs again, nothing else does.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found (tried: $(CANDIDATES)). Set PYTHON=/path/to/python3."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	@echo "Installing dpo-peft and what it needs (minutes the first time)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	@echo "Installing dpo-peft with its test and development tools (minutes the first time)"
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.runtime
