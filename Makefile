# `make` lists the targets. Each sets up ./.venv first, which costs nothing once it is up to date.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench accuracy chaos fuzz recovery k8s image-test audit clean

SECONDS ?= 600
DOCUMENTS ?= 20000
SEED ?= 1
WORKERS ?= 4
JOBS ?= 3

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 17

setup:  ## create ./.venv with dltask and everything it needs
	@scripts/setup.sh

# The last line on stdout is the demo's own, JSON: nothing may print after it (from elsewhere: make -s -C DIR demo).
demo: setup  ## train and test a detector on this machine: no MongoDB, no GPU needed
	@.venv/bin/dltask demo

# By files, which share their servers, the longest first. More jobs than cores, since most tests wait.
test: setup  ## JOBS=3: run every test
	@.venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: setup  ## ruff, strict mypy, and the layers (import-linter)
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports

# Each writes its rows into benchmarks/results.json; the last puts them into docs/performance.md.
BENCHMARKS = reaction first_iteration drain watchers message image_path steps inference evaluation idle growth memory figures

bench: setup  ## how fast it is beside the floor and a peer (half an hour)
	@for name in $(BENCHMARKS); do echo "== benchmarks/$$name.py"; .venv/bin/python benchmarks/$$name.py || exit 1; done

accuracy: setup  ## train and test on real data with default parameters, three seeds each (hours)
	@.venv/bin/python benchmarks/accuracy.py

# Not `make test` only longer: its last line is one JSON object, and nothing may print after it.
chaos: setup  ## SECONDS=600 SEED=1 WORKERS=4: faults of workers and database, and what became of every task
	@.venv/bin/python -m tests.chaos --seconds $(SECONDS) --seed $(SEED) --workers $(WORKERS)

fuzz: setup  ## DOCUMENTS=20000 SEED=1: hostile task documents against a real server and service
	@DLTASK_FUZZ_DOCUMENTS=$(DOCUMENTS) DLTASK_FUZZ_SEED=$(SEED) .venv/bin/python -m pytest -q --timeout=7200 tests/fuzz

recovery: setup  ## how soon the service is itself again after a fault (25 minutes)
	@.venv/bin/python benchmarks/recovery.py

k8s: setup  ## render every overlay into build/k8s, and validate what is rendered
	@mkdir -p build/k8s && for folder in k8s/base k8s/overlays/*; do \
		.venv/bin/kubectl kustomize "$$folder" >"build/k8s/$$(basename "$$folder").yaml" || exit 1; done
	@.venv/bin/python -m pytest -q tests/unit/test_manifests.py tests/unit/test_manifest_schemas.py

# Its last line is one JSON object, and nothing may print after it.
image-test: setup  ## build the image and run it for real, without Docker (root; half an hour, 45 GB while it runs)
	@.venv/bin/python -m tests.image

# --strict: else what cannot be looked up counts as having no vulnerability.
audit: setup  ## look up known vulnerabilities of the pinned dependencies (needs pypi.org)
	@dir=$$(mktemp -d) && trap 'rm -r "$$dir"' EXIT && .venv/bin/python -m venv "$$dir" \
		&& "$$dir/bin/pip" -q install pip-audit \
		&& "$$dir/bin/pip-audit" --strict --progress-spinner off --no-deps --disable-pip -r constraints.txt

clean:  ## remove caches and build output (.venv stays: to remove it, rm -r .venv)
	@rm -rf build dist demo-output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
