# `make demo` and `make test` do everything themselves on a machine that has Python 3.11 and make.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
# 20 seconds are too few for the server of `make demo` on a machine that has other work.
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS ?= 120
export PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW ?= ignore
export HF_HUB_DISABLE_TELEMETRY ?= 1
export DO_NOT_TRACK ?= 1
# Stages are processes that start often: without compiled modules each start takes a third longer.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup lock demo serve pool test soak hardening check lint gpu peers-env engines-env engines clean

setup: $(STAMP)

# Every file is checked against its hash. Not torch's: which build is right depends on the machine, and some are local.
$(STAMP): pyproject.toml requirements.lock requirements-torch.lock
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/pip install --quiet --no-compile --requirement requirements-torch.lock
	$(BIN)/pip install --quiet --no-compile --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Writes the environment's releases into requirements.lock, with the hashes of all their files, and beside them what other
# releases of Python and other systems need. torch's build is not in it; sympy stands for what torch needs.
lock: setup
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet 'uv==0.13.*'
	$(BIN)/pip freeze --all --exclude-editable > .venv-lock/here.txt
	echo torch > .venv-lock/torch.txt
	echo sympy | .venv-lock/bin/uv pip compile --quiet --universal --constraints .venv-lock/here.txt --excludes .venv-lock/torch.txt \
		--generate-hashes --no-annotate --no-header --extra dev pyproject.toml - --output-file requirements.lock
	rm -r .venv-lock

demo: setup
	$(BIN)/python -m flows.quantize

# Prefect, MLflow, a worker and the deployments on this machine, see docs/operate.md. Ctrl-C stops everything.
serve: setup
	$(BIN)/python -m services serve

# Workers of the GPU pool, and a Prefect server unless PREFECT_API_URL names one.
WORKERS ?= 2
pool: setup
	$(BIN)/python -m services pool --workers $(WORKERS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Lint, types and the fast tests; tests/support/slow.py lists the slow ones.
check: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow and not soak and not engine"

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The long tests: kills of every process of a pool, attacks, PostgreSQL, all bad inputs, every family with every recipe and
# scheme, an installation from the index.
soak: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m soak

# Bad inputs, attacks and kills, about 45 minutes; writes docs/hardening.md. PARTS=kills runs one part again, see
# tests/support/hardening.py.
PARTS ?=
hardening: setup
	PYTHONPATH=tests $(BIN)/python -m support.hardening $(PARTS)

# What needs a GPU: its tests and measurements, at most eight minutes; writes docs/gpu.md.
gpu: setup
	$(BIN)/python -m bench.gpu

# llm-compressor pins other versions of transformers and compressed-tensors: it gets an environment of its own.
peers-env: .venv-peers/.installed

.venv-peers/.installed:
	test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --no-compile --requirement requirements-torch.lock
	.venv-peers/bin/pip install --quiet 'llmcompressor==0.14.*'
	touch $@

# Engines in environments of their own; the demo model's exports in all of them, see docs/engines.md.
engines-env: setup
	$(BIN)/python -m bench.engines.environments

engines: engines-env
	$(BIN)/dvc repro --quiet demo
	$(BIN)/python -m bench.engines

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
