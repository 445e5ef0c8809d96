# `make` lists the targets. Each sets up ./.venv first, which costs nothing once it is up to date.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

setup:  ## create ./.venv with dltask and everything it needs
	@scripts/setup.sh

# The last line on stdout is the demo's own, JSON: nothing may print after it (from elsewhere: make -s -C DIR demo).
demo: setup  ## train and test a detector on this machine: no MongoDB, no GPU needed
	@.venv/bin/dltask demo

test: setup  ## run every test
	@.venv/bin/python -m pytest

lint: setup  ## ruff, strict mypy, and the layers (import-linter)
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports

bench: setup  ## run every script in benchmarks/
	@for script in benchmarks/*.py; do echo "== $$script"; .venv/bin/python "$$script" || exit 1; done

clean:  ## remove caches and build output (.venv stays: to remove it, rm -r .venv)
	@rm -rf build dist demo-output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
