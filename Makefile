# Everything from a bare Python 3.11: each target installs what it needs into .venv, once.

PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --constraint constraints.txt

.PHONY: help demo test bench lint clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

demo: .venv/examples  ## learn on real data, then kernels against the cone program: tables, and pictures in out/
	$(PY) examples/demo.py
	$(PY) examples/shortest_path.py
	$(PY) -m convlayer compare

test: lint  ## lint, types and all tests
	$(PY) -m pytest -q --numprocesses 2 --dist worksteal

bench: .venv/benchmarks  ## us against the peers, side by side: the cone program, then the structures
	$(PY) -m benchmarks

lint: .venv/dev  ## style and types
	$(PY) -m ruff check
	$(PY) -m mypy convlayer problems examples

clean:  ## remove .venv, pictures and caches
	rm -rf .venv out build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An old pip resolves these requirements in hours; the build of torch is settled first, by its constraint alone.
.venv/torch: constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --upgrade pip
	$(INSTALL) torch
	@touch $@

.venv/examples .venv/dev .venv/benchmarks: .venv/%: .venv/torch pyproject.toml
	$(INSTALL) --editable '.[$*]'
	@touch $@
