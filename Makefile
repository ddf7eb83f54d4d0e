# Everything that a newcomer types. `make` alone says what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
export PYTHONPATH := deploy/local
# The tests' and the demo's AWS clients never ask a cloud's metadata address.
export AWS_EC2_METADATA_DISABLED := true

.PHONY: help
help:  ## What there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "Built once and kept: $${CHECKPOINT_OPERATOR_CACHE:-~/.cache/checkpoint-operator}"

.PHONY: demo
demo: $(STAMP)  ## The main job, live: a checkpoint goes from a volume to a bucket (KEEP=1: leave it running)
	@$(BIN)/python deploy/demo/demo.py

.PHONY: demo-down
demo-down: $(STAMP)  ## Stop what `make demo KEEP=1` left running
	@$(BIN)/python deploy/demo/demo.py down

.PHONY: test
test: $(STAMP)  ## All tests, with a real Kubernetes and a real S3
	@echo "==> Kubernetes for the tests (built once, which takes about nine minutes)"
	@$(BIN)/python -m local_cluster build >/dev/null
	@echo "==> all tests"
	@$(BIN)/python -m pytest

.PHONY: test-unit
test-unit: $(STAMP)  ## The tests that need no cluster, within a minute
	@$(BIN)/python -m pytest tests/unit

.PHONY: lint
lint: $(STAMP)  ## ruff, mypy, the rooms of the design, and generated files
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> import-linter"
	@$(BIN)/lint-imports
	@echo "==> generated files"
	@$(BIN)/python deploy/generate.py --check

.PHONY: generate
generate: $(STAMP)  ## Write the CRD and the tables in docs/ from the code
	@$(BIN)/python deploy/generate.py

.PHONY: bench
bench: $(STAMP)  ## The transfer engine against the SDK's own upload, in the same run
	@$(BIN)/python benchmarks/transfer.py

.PHONY: cluster-up
cluster-up: $(STAMP)  ## A Kubernetes to try things on; prints two export lines
	@$(BIN)/python -m local_cluster up

.PHONY: cluster-down
cluster-down: $(STAMP)  ## Stop it
	@$(BIN)/python -m local_cluster down

.PHONY: lock
lock: $(STAMP)  ## Lock the dependencies anew, with hashes (uv comes from a throw-away environment)
	@$(PYTHON) -m venv $(VENV)/uv && $(VENV)/uv/bin/pip install --quiet uv
	@$(VENV)/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --group dev --extra s3 --extra operator pyproject.toml --output-file requirements/dev.txt

.PHONY: clean
clean:  ## Remove what was made in this folder (what was built once is kept)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Not dependent on the whole pyproject.toml: only what is installed matters, and the lock says that.
$(STAMP): requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.12 …" >&2; exit 1; }
	@echo "==> Python environment in $(VENV) (once, about a minute)"
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "the module 'venv' does not work: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
