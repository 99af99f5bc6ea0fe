# `make demo` and `make test` work in a fresh clone with nothing installed but Python 3.11 or newer.
# With an NVIDIA GPU: make demo EXTRAS=gpu
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PLAN := $(VENV)-plan
EXTRAS ?=

.PHONY: demo test aot lint gpu clean

demo: $(VENV)/.demo$(EXTRAS)
	$(BIN)/python experiments/decode.py --compare-ar $(ARGS)

test: lint aot
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not aot" $(ARGS)

# The compiler for an H100 lives in its own environment: without a driver it complains whenever JAX starts.
aot: $(PLAN)/.ready
	$(PLAN)/bin/python -m pytest -m aot tests/test_h100_plan.py tests/test_triton.py

# On a machine with an H100, whose Python has JAX and Flax; nothing is installed. ARGS=--tiny checks it anywhere.
gpu:
	$(PYTHON) experiments/h100_bench.py --out runs/h100 --all $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

# A stamp per set of extras; a changed pyproject.toml installs again.
$(VENV)/.demo$(EXTRAS): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[test,parity]'
	touch $@ $(VENV)/.demo

$(PLAN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(PLAN)
	$(PLAN)/bin/python -m pip install --quiet -e '.[test,plan]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(PLAN) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
