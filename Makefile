# Two commands matter: `make demo` and `make test`. Each does all of its own set-up.
SHELL := /bin/sh
PYTHON := .venv/bin/python
ARGS ?=
# Of a GPU machine: one with torch and Triton is enough, and nothing is installed.
GPU_PYTHON ?= python3
GPU_JSON ?=

.PHONY: help setup demo test test-all soak gpu-check lint format clean

help:
	@echo "make demo   A*PO from start to end on this machine's CPU: sweep, training, evaluation, export (runs/demo)"
	@echo "make test   the test suite; 'make test ARGS=\"tests/test_config.py -k base\"' runs a part of it"
	@echo "Others: setup, test-all (slow ones too), soak (an hour of faults), gpu-check (on a GPU machine), lint, format, clean"

setup:
	@.ci/setup

demo: setup
	$(PYTHON) examples/quickstart.py $(ARGS)

test: setup
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest $(ARGS)

test-all: setup
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -m "" $(ARGS)

# Half an hour of training under faults, then as many steps without: an hour in all.
soak: setup
	HF_HUB_OFFLINE=1 ASTAR_SOAK_SECONDS=1800 $(PYTHON) -m pytest -m slow tests/e2e/test_soak.py $(ARGS)

# What only a GPU shows, with the python that has torch there; then the tables of the head (under 8 minutes so far) and of
# a policy rank, which fails where a step is slower than its fusions make it. What lacks packages is skipped by name;
# the rest runs whatever fails.
gpu-check: export PYTHONPATH := .:$(PYTHONPATH)
gpu-check: export PYTHONWARNINGS := ignore
gpu-check:
	@$(GPU_PYTHON) tests/benchmarks/gpu_machine.py || exit 1; problems=0; \
	$(GPU_PYTHON) -m pytest -m gpu -rs --continue-on-collection-errors tests/model \
		tests/conversion/test_every_way.py $(ARGS) || problems=1; \
	$(GPU_PYTHON) tests/benchmarks/gpu_head.py $(if $(GPU_JSON),--json $(GPU_JSON)) || problems=1; \
	$(GPU_PYTHON) tests/benchmarks/gpu_rank.py $(if $(GPU_JSON),--json $(GPU_JSON:.json=_rank.json)) || problems=1; \
	exit $$problems

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Keeps .venv and runs/: they took time to make.
clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
