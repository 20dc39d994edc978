# Everything starts here; `make help` lists it. Nothing needs to be exported or installed before: uv, Python packages, the
# cluster's programs and the images are found or built, and cached.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.cache/uv/bin:$(PATH)
# What starts again and again is compiled once, also where somebody has told Python not to: torch's import takes a third of the time then.
unexport PYTHONDONTWRITEBYTECODE
PYTHON := .venv/bin/python
RUN := PYTHONPATH=.:tests $(PYTHON)
PYTEST := $(PYTHON) -m pytest

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 18

.venv/synced: pyproject.toml uv.lock tools/bootstrap
	@tools/bootstrap
	@touch $@

.PHONY: setup
setup: .venv/synced ## Python environment from the lock file

.PHONY: demo demo-down
demo: .venv/synced ## a Kubernetes, the operator, a fine-tuning job and its answers, in about ten minutes once built
	@$(RUN) -m demo up
demo-down: .venv/synced ## removes all that `make demo` started
	@$(RUN) -m demo down

.PHONY: local
local: .venv/synced ## the same job without a cluster, into build/quickstart: about two minutes on 2 cores
	@model="$$($(RUN) -c 'from cluster.model import SMOLLM2, model_path; print(model_path(SMOLLM2))')" && \
	.venv/bin/finetune local -f examples/quickstart.yaml --model "$$model" --output build/quickstart --scratch build/scratch

.PHONY: check format generate
check: .venv/synced ## formatting, lint, types, layers, generated files, chart
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports
	tools/generate --check
	tools/lint-chart
format: .venv/synced ## formats the code
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
generate: .venv/synced ## writes the CRD, the chart's copy, the API reference and the table of what is supported
	tools/generate

.PHONY: test unit tools training soak clusters api e2e
test: unit tools ## every tier: the trainer's own tests compute while those on clusters wait
	@$(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,--jobs=2 --output-sync=target) training clusters
clusters: # one after the other: each has two clusters of its own
	@$(MAKE) --no-print-directory api
	@$(MAKE) --no-print-directory e2e
unit: .venv/synced ## pure tests: seconds
	$(PYTEST) tests/unit -q
tools: .venv/synced # before clusters build for minutes: one build at a time a machine, and a test waits ten minutes at most
	@PYTHONPATH=tests $(PYTHON) -m cluster build --tools
training: tools ## parity, exactness and kill tests of the trainer: minutes, no cluster
	$(PYTEST) tests/training tests/shell -q -n 2 --dist worksteal
soak: tools ## the trainer's tests that `make test` leaves out: every family with every task and method
	$(PYTEST) tests/training -q -n 2 -m soak
api: .venv/synced ## operator against a real API server with simulated nodes
	@PYTHONPATH=tests $(PYTHON) -m cluster build --profile api
	$(PYTEST) tests/api -q -n 4
e2e: .venv/synced ## operator and trainer on a real kubelet with real containers
	@PYTHONPATH=tests $(PYTHON) -m cluster build --profile full
	$(PYTEST) tests/e2e -q -n 2 --dist worksteal

.PHONY: bench-operator
bench-operator: .venv/synced ## 500 FineTuneJobs beside bare Indexed Jobs; writes the table in bench/
	$(RUN) bench/operator_load.py
