# Everything runs in .venv, which the first target makes; a stamp file says what is installed in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -q --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test lint types structure zoo bench clean

demo: $(VENV)/.demo-installed
	$(BIN)/foveate demo --out demo/

test: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.test-installed
	$(BIN)/ruff check $(wildcard src tests benchmarks)
	$(BIN)/ruff format --check $(wildcard src tests benchmarks)

types: $(VENV)/.test-installed
	$(BIN)/mypy

structure: $(VENV)/.test-installed
	$(BIN)/python -m pytest tests/test_structure.py

zoo: $(VENV)/.test-installed
	$(BIN)/python -m foveate.zoo.train
	$(BIN)/python -m foveate.zoo.train.companion
	$(BIN)/python -m foveate.zoo.train.vilt

bench: $(VENV)/.demo-installed
	$(BIN)/python benchmarks/speed.py --json benchmarks/results/speed.json

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[data]"
	@touch $@

$(VENV)/.test-installed: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[test]"
	@touch $@ $(VENV)/.demo-installed
