# Everything that a newcomer types. `make` alone says what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
# The lock decides what is installed, pyproject.toml how our own package is; each has its stamp.
LOCKED := $(VENV)/.locked
STAMP := $(VENV)/.stamp
# What the benchmark compares with, apart from what we depend on.
PEERS := $(VENV)/bench/.stamp
# What looks at the chart; it pins a hundred packages, so it is apart as well.
CHART_TOOLS := $(VENV)/chart/.stamp
CACHE := $${CHECKPOINT_OPERATOR_CACHE:-~/.cache/checkpoint-operator}
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PYTHONPATH := $(CURDIR)/deploy/local
# The tests' and the demo's AWS clients never ask a cloud's metadata address.
export AWS_EC2_METADATA_DISABLED := true

.PHONY: help
help:  ## What there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "Kubernetes is built once and kept in $(CACHE)"

.PHONY: demo
demo: $(STAMP)  ## The main job, live: a checkpoint goes from a volume to a bucket (KEEP=1: leave it running)
	@$(BIN)/python deploy/demo

.PHONY: demo-down
demo-down: $(STAMP)  ## Stop what `make demo KEEP=1` left running
	@$(BIN)/python deploy/demo down

.PHONY: test
test: programs  ## All tests, with a real Kubernetes and a real S3
	@echo "==> all tests, in two processes (ARGS=-n0: in one, and in order)"
	@$(BIN)/python -m pytest -n 2 --no-loadscope-reorder $(ARGS)

.PHONY: test-scale
test-scale: programs  ## Ten thousand files and 3 GiB on every store (`make test` gives the slow servers less)
	@TEST_SCALE=full $(BIN)/python -m pytest tests/storage/test_scale.py -s

.PHONY: test-unit
test-unit: $(STAMP)  ## The tests that need no cluster, within a minute
	@$(BIN)/python -m pytest tests/unit

# Whoever brings a cluster needs none of the programs that start one.
.PHONY: e2e
e2e: $(if $(filter-out native,$(CLUSTER)),$(STAMP),programs)  ## The operator as users install it, on nodes that run pods (CLUSTER=existing: yours, kind: by kind)
	@$(BIN)/python -m pytest tests/e2e $(ARGS)

.PHONY: lint
lint: $(STAMP) $(CHART_TOOLS)  ## ruff, mypy, the rooms of the design, generated files, and the chart
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy: the package, then the tools beside it"
	@$(BIN)/mypy
	@$(BIN)/mypy deploy/*.py deploy/demo/*.py deploy/local/local_cluster/*.py
	@$(BIN)/mypy deploy/image/rootfs.py
	@echo "==> hadolint"
	@$(BIN)/hadolint Dockerfile
	@echo "==> import-linter"
	@$(BIN)/lint-imports --no-logo
	@echo "==> generated files"
	@$(BIN)/python deploy/generate.py --check
	@echo "==> the chart: helm lint, the schemas of Kubernetes, checkov"
	@$(BIN)/python deploy/lint_chart.py $(VENV)/chart/bin

.PHONY: generate
generate: $(STAMP)  ## Write the CRD, the tables in docs/ and deploy/manifests/ from the code and the chart
	@$(BIN)/python deploy/generate.py

.PHONY: bench
bench: $(STAMP)  ## What is in benchmarks/: tables, never a timed test
	@echo "==> the controller"
	@$(BIN)/python benchmarks/controller.py
	@$(MAKE) bench-transfer

.PHONY: bench-transfer
bench-transfer: $(STAMP) $(PEERS)  ## The transfer engine beside s5cmd, rclone, obstore and boto3 (ARGS="--rounds 1 --help")
	@echo "==> the transfer engine"
	@$(BIN)/python benchmarks/transfer.py $(ARGS)

.PHONY: bench-cluster
bench-cluster: programs  ## Artifacts on a real node: seconds, API calls, memory, a restart among 100 movers (ARGS="--only latency")
	@echo "==> movers as Jobs, on a node"
	@$(BIN)/python benchmarks/cluster.py $(ARGS)

.PHONY: cluster-up
cluster-up: $(STAMP)  ## A Kubernetes to try things on; prints two export lines (NODE=1 or 2: with nodes that run pods)
	@$(BIN)/python -m local_cluster up $(if $(NODE),--nodes $(NODE))

.PHONY: cluster-down
cluster-down: $(STAMP)  ## Stop it
	@$(BIN)/python -m local_cluster down

.PHONY: kind-node
kind-node: $(STAMP)  ## What kind needs on this machine, made once (Docker, kind, its node image); prints the image's path
	@$(BIN)/python -m local_cluster kind-node

.PHONY: image
image: $(STAMP)  ## The image of operator and mover as an archive; prints its path
	@$(BIN)/python -m local_cluster image

.PHONY: lock
lock:  ## Lock the dependencies anew, with hashes (uv comes from a throw-away environment)
	@$(find_python); folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
		"$$python" -m venv "$$folder" && "$$folder/bin/pip" --disable-pip-version-check --quiet install uv; \
		"$$folder/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
			--no-emit-index-url --group dev --extra s3 --extra gcs --extra azure --extra operator pyproject.toml --output-file requirements/dev.txt; \
		"$$folder/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
			--no-emit-index-url requirements/bench.in --output-file requirements/bench.txt; \
		"$$folder/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
			--no-emit-index-url requirements/chart.in --output-file requirements/chart.txt; \
		"$$folder/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
			--no-emit-index-url --constraint requirements/dev.txt \
			--extra s3 --extra gcs --extra azure --extra operator pyproject.toml --output-file requirements/image.txt; \
		"$$folder/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
			--no-emit-index-url --constraint requirements/dev.txt requirements/build.in --output-file requirements/build.txt
	@echo "wrote dev.txt, bench.txt, chart.txt, image.txt and build.txt in requirements/"

.PHONY: clean
clean:  ## Remove what was made in this folder (what was built once is kept)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis benchmarks/results
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Kept: the Kubernetes that was built once, in $(CACHE)"

# What is there already, or is provided by somebody (CLUSTER_PROVIDER, KUBEBUILDER_ASSETS), is not built.
.PHONY: programs
programs: $(STAMP)
	@echo "==> the programs that the tests start (built once: Kubernetes takes about nine minutes, the stores about four;"
	@echo "    kept in $(CACHE))"
	@$(BIN)/python -m local_cluster build >/dev/null

# The first that is new enough; PYTHON=/path/to/python3.12 decides otherwise.
PYTHON ?=
define find_python
python=; for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
	echo "Python 3.11 or newer is needed, and there is none: tried $(or $(PYTHON),python3 and python3.11 to python3.14)." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
fi; \
if ! "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	echo "$$python cannot make environments, its modules venv and ensurepip are missing." >&2; \
	echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
fi
endef

# What these say goes to standard error: `eval "$(make -s cluster-up)"` reads the other.
$(LOCKED): requirements/dev.txt
	@$(find_python); \
		echo "==> Python environment in $(VENV), with $$("$$python" --version) (once, about a minute)" >&2; \
		"$$python" -m venv --clear $(VENV) >&2
	@$(PIP) install --require-hashes -r requirements/dev.txt >&2
	@touch $@

$(STAMP): $(LOCKED) pyproject.toml
	@echo "==> this checkout, into $(VENV)" >&2
	@$(PIP) install --no-deps --no-build-isolation --editable . >&2
	@touch $@

$(PEERS): requirements/bench.txt | $(STAMP)
	@echo "==> the peers of the benchmark, into $(VENV)/bench" >&2
	@$(BIN)/python -m venv --clear $(VENV)/bench >&2
	@$(VENV)/bench/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r requirements/bench.txt >&2
	@touch $@

$(CHART_TOOLS): requirements/chart.txt | $(STAMP)
	@echo "==> checkov and kubernetes-validate, into $(VENV)/chart (once)" >&2
	@$(BIN)/python -m venv --clear $(VENV)/chart >&2
	@$(VENV)/chart/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r requirements/chart.txt >&2
	@touch $@
