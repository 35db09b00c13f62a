# Every target works in a fresh clone. The first target that runs, except `help`, creates the Python environment .venv/.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# The tests start hundreds of Python processes. Some images set this variable to 1; each process would then compile all
# modules again, which doubles the time of `import torch`. The empty value counts as not set.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test check audit api bench faults versions ui

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Run every stage on generated pictures
	$(BIN)/lakesight demo

test: check  ## Run all checks and the fast tests
	-$(BIN)/python -P -m pipelines.platform.build_class_archive
	$(BIN)/pytest -n 2 --dist loadgroup --max-worker-restart 0

check: $(STAMP)  ## Check lint, formatting, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(STAMP)  ## Check the licences of all dependencies, and look for published vulnerabilities
	$(BIN)/python .ci/audit.py

api: $(STAMP)  ## Write docs/api.md from the docstrings of the package vlm
	$(BIN)/python .ci/api_page.py

bench: $(STAMP)  ## Run all benchmarks of docs/benchmarks.md
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

faults: $(STAMP)  ## Run the slow tests and the tests that kill ranks and processes
	$(BIN)/pytest -n 2 --dist loadgroup -m "faults or matrix"

versions: $(STAMP)  ## Run tests with each supported version of Spark and Python, and with the oldest dependencies
	$(BIN)/python .ci/versions.py $(ROWS)

ui: $(STAMP)  ## Serve the MLflow UI
	$(BIN)/lakesight ui

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Lakesight needs Python 3.11 or later; $(PYTHON) is older or missing. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@"$${JAVA_HOME:+$$JAVA_HOME/bin/}java" -version 2>&1 | grep -Eq 'version "(1[7-9]|[2-9][0-9])' || \
	  { echo "Lakesight needs Java 17 or later for Spark. Debian, Ubuntu: apt install openjdk-17-jre-headless; macOS: brew install openjdk@17; then set JAVA_HOME" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[local,dev]' || \
	  { echo "uv does not read pip's settings (index, proxy, certificates). Trying again with pip:" >&2; \
	    $(BIN)/pip install --quiet -c constraints.txt -e '.[local,dev]'; }
	@touch $@
