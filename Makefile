# Every target but clean makes .venv first when it is missing or older than the files that define it.
#   make test ARGS="-k storage"      ARGS goes to pytest
#   make demo ARGS="--steps 20"      ARGS goes to the demo
# constraints.txt asks for torch 2.13.0. PyPI's Linux wheel of it is the CUDA build; for the smaller CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MYPY_LINK := build/mypy/lowbit_optim/kernels

.DEFAULT_GOAL := test
.PHONY: demo test lint bench docs site-test clean

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo,docs]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m lowbit_optim demo $(ARGS)

# One thread in each worker: several OpenMP threads on busy cores are far slower than one.
test docs: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# The link shows mypy kernels/ as lowbit_optim.kernels (see pyproject.toml).
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(dir $(MYPY_LINK))
	ln -sfn ../../../kernels $(MYPY_LINK)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.quantization_error
	$(BIN)/python -m benchmarks.recursive_error

# Every code block runs, and warnings are errors: a broken link, a page that no other leads to. From nothing, because Sphinx leaves
# pages there that are gone, and runs no tutorial again that has not changed itself.
docs: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile tests/docs/test_blocks.py
	rm -rf build/site docs/gallery
	$(BIN)/sphinx-build --builder html --nitpicky --fail-on-warning --keep-going docs build/site
	@echo "build/site/index.html"

# After `make docs`; needs chromium (on Debian: apt-get update && apt-get install -y chromium).
# SITE_SCREENSHOTS=folder make site-test keeps a picture of every page.
site-test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS) tests/docs/browser.py

# Leaves .venv alone; delete it to have it made anew.
clean:
	rm -rf build dist docs/gallery docs/figures/drawn *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks docs kernels lowbit_optim tests -type d -name __pycache__ -prune -exec rm -rf {} +
