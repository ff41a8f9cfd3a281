# Everything from a bare Python 3.11: each target installs what it needs into .venv, once.

PYTHON ?= python3
PY := .venv/bin/python
PARALLEL := --numprocesses 2 --dist worksteal
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
CONSTRAINTS ?= constraints.txt
INSTALL := $(PY) -m pip install --constraint $(CONSTRAINTS)
CORE := convlayer/core/src

.PHONY: help demo test test-all test-installed test-lowest bench core-check lint format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo: .venv/examples  ## learn on real data, then kernels against the cone program: tables, and pictures in out/
	$(PY) examples/demo.py
	$(PY) examples/shortest_path.py
	$(PY) -m convlayer compare

test: lint  ## lint, types and tests: every law, over all cases or a Latin square of them
	$(PY) -m pytest $(PARALLEL)

test-all: lint  ## the same with every law over every case, and the tests that take long
	$(PY) -m pytest $(PARALLEL) --all

test-installed: .venv/dev  ## a plain install in an environment of its own, tried from the root of the checkout and on its own
	rm -rf build/lib* build/temp.* build/bdist.* build/installed
	$(PY) -m venv --without-pip build/installed
	$(PY) -m pip --python build/installed/bin/python install --no-deps .
	$(PY) -c '$(PACKAGES)' > $$(build/installed/bin/python -c '$(PACKAGES)')/dependencies.pth
	build/installed/bin/python -m convlayer doctor
	build/installed/bin/python -m pytest tests/test_import.py
	cd build && installed/bin/convlayer --version
	build/installed/bin/python -P -m pytest tests/test_problems.py

test-lowest:  ## every law on the lowest versions that pyproject.toml allows, in an environment of its own
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/python .ci/lowest.py > build/lowest.txt
	build/lowest/bin/python -m pip install --upgrade pip
	build/lowest/bin/python -m pip install --constraint build/lowest.txt torch
	build/lowest/bin/python -m pip install --constraint build/lowest.txt --editable '.[dev]'
	build/lowest/bin/python -m pytest $(PARALLEL)

bench: .venv/benchmarks  ## us against the peers, side by side: the cone program, then the structures
	$(PY) -m benchmarks

core-check:  ## the compiled core under sanitizers: addresses, undefined behaviour, threads; without a compiler nothing
	@command -v $(firstword $(CXX)) > /dev/null || { echo "no compiler $(CXX): the compiled core is not checked"; exit 0; }; \
	mkdir -p build && for kind in address,undefined thread; do echo "core-check: $$kind"; \
	$(CXX) -std=c++17 -O1 -g -fsanitize=$$kind -fno-sanitize-recover=all -pthread -I$(CORE) $(CORE)/check.cpp \
	    -o build/check-$$kind && build/check-$$kind || exit 1; done

lint: .venv/dev  ## style and types
	$(PY) -m ruff format --check --quiet
	$(PY) -m ruff check
	$(PY) -m mypy convlayer examples

format: .venv/dev  ## imports in order, lines within a hundred columns
	$(PY) -m ruff check --select I --fix
	$(PY) -m ruff format

clean:  ## remove .venv, pictures and caches
	rm -rf .venv out build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An old pip resolves these requirements in hours; the build of torch is settled first, by its constraint alone.
.venv/torch: constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --upgrade pip
	$(INSTALL) torch
	@touch $@

.venv/examples .venv/dev .venv/benchmarks: .venv/%: .venv/torch pyproject.toml setup.py $(wildcard $(CORE)/core.cpp $(CORE)/*.h* $(CORE)/*/*.h*)
	$(INSTALL) --editable '.[$*]'
	@touch $@
