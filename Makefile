# `make demo` and `make test` work in a fresh clone with nothing installed but Python 3.11 or newer.
# With an NVIDIA GPU: make demo EXTRAS=gpu
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PLAN := $(VENV)-plan
EXTRAS ?=

# For the versions of JAX that need Python 3.12: one that runs (a shim of pyenv may not).
PYTHON312 ?= $(shell for python in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do \
	"$$python" -c '' 2> /dev/null && echo "$$python" && break; done)
JAX_VERSIONS := 0.11.2 0.12.0.1
QUICK := tests/test_kernels.py tests/test_expert_kernels.py tests/test_golden.py tests/test_program.py

.PHONY: demo test aot versions lint gpu clean

demo: $(VENV)/.demo$(EXTRAS)
	$(BIN)/python experiments/decode.py --compare-ar $(ARGS)

test: lint aot
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not aot" $(ARGS)

# The compiler for an H100 lives in its own environment: without a driver it complains whenever JAX starts.
aot: $(PLAN)/.ready
	$(PLAN)/bin/python -m pytest -m aot tests/test_h100_plan.py tests/test_triton.py tests/test_kernel_limits.py

# What depends most on the version of JAX, on the others that are supported.
versions: $(JAX_VERSIONS:%=$(VENV)-%/.ready)
	for version in $(JAX_VERSIONS); do \
		JAX_PLATFORMS=cpu $(VENV)-$$version/bin/python -m pytest -n 2 --max-worker-restart 0 -m "not aot" $(QUICK) && \
		$(VENV)-$$version/bin/python -m pytest -m aot tests/test_h100_plan.py tests/test_triton.py || exit; \
	done

$(VENV)-%/.ready: pyproject.toml
	@test -n "$(PYTHON312)" || { echo "error: jax $* needs Python 3.12, and there is none: PYTHON312=PATH names one" >&2; exit 2; }
	$(PYTHON312) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet jax==$* jax-cuda13-plugin==$* -e '.[test,plan]'
	touch $@

# On a machine with an H100, whose Python has JAX, Flax and transformers; nothing is installed. ARGS=--tiny checks it
# anywhere. PYTHON=.venv/bin/python takes the environment of make demo EXTRAS=gpu.
gpu:
	$(PYTHON) experiments/h100_bench.py --out runs/h100$(findstring -tiny,$(ARGS)) --all $(ARGS)

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
	rm -rf $(VENV) $(PLAN) $(JAX_VERSIONS:%=$(VENV)-%) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
