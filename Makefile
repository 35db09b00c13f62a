# Every target works on a fresh clone: the environment is made once, in .venv/.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check bench faults ui

help:  ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Ingest, train, register and caption generated scenes: the whole job
	$(BIN)/lakesight demo

test: check  ## Run every check and every test
	$(BIN)/pytest -n 2 --dist loadgroup

check: $(STAMP)  ## Lint, formatting, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## Measure the ratios of docs/benchmarks.md
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

faults: $(STAMP)  ## Kill ranks and processes on purpose, and look what is left; and every test that takes long
	$(BIN)/pytest -m "faults or matrix"

ui: $(STAMP)  ## Open the MLflow UI on what was tracked here
	$(BIN)/lakesight ui

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Lakesight needs Python 3.11 or later; $(PYTHON) is older or missing. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@"$${JAVA_HOME:+$$JAVA_HOME/bin/}java" -version 2>&1 | grep -Eq 'version "(1[7-9]|[2-9][0-9])' || \
	  { echo "Lakesight needs Java 17 or later for Spark. Debian, Ubuntu: apt install openjdk-17-jre-headless; macOS: brew install openjdk@17; then set JAVA_HOME" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[local,dev]'
	@touch $@
