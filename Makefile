# Everything from a clean clone: `make test`, `make demo`. Needs Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
# A torch >= 2.10 that $(PYTHON) already has is used as it is; otherwise $(TORCH) is installed. One
# of a virtual environment is not seen from another, so the new environment is what is asked.
HAS_TORCH = $(BIN)/python -c "import torch, sys; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))"

.PHONY: help install test test-slow lint demo bench figures clean

help:
	@echo "make install | test | test-slow | lint | demo | bench | figures | clean"

install: $(BIN)/kdkernels

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(HAS_TORCH) 2>/dev/null || \
		{ $(PYTHON) -m venv --clear $(VENV) && $(BIN)/pip install -q "$(TORCH)"; }
	$(BIN)/pip install -q "setuptools>=68" wheel "pybind11>=2.12"
	touch $@

# KDKERNELS_BUILD=1: here a kernel that does not compile is an error, not a warning.
$(BIN)/kdkernels: $(VENV)/ready setup.py $(shell find csrc -type f)
	KDKERNELS_BUILD=1 $(BIN)/pip install -q --no-build-isolation \
		--config-settings editable_mode=compat -e ".[train,triton,test]"
	touch $@

test: install
	$(BIN)/python -m pytest -n auto --durations=10 $(PYTEST_ARGS)

test-slow: install
	$(BIN)/python -m pytest -n auto --dist loadfile -m "slow and not gpu" $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

demo: install
	$(BIN)/python examples/demo.py

bench: install
	$(BIN)/kdkernels bench $(BENCH_ARGS)

# The committed results and all that is generated from them; wants a quiet machine.
figures: install
	$(BIN)/python benchmarks/run.py --threads 2
	$(BIN)/python benchmarks/plot.py

clean:
	rm -rf $(VENV) build kdkernels.egg-info kdkernels/*.so kdkernels/_build.json demo
