# `make demo` and `make test` do everything themselves on a machine that has Python 3.11 and make.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW ?= ignore
export HF_HUB_DISABLE_TELEMETRY ?= 1
export DO_NOT_TRACK ?= 1

.PHONY: setup demo test lint peers-env clean

setup: $(STAMP)

# torch first and by its exact version: a CPU wheel is taken where one is provided.
$(STAMP): pyproject.toml requirements.lock
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python -m flows.quantize

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

# llm-compressor pins other versions of transformers and compressed-tensors: it gets an environment of its own.
peers-env: .venv-peers/.installed

.venv-peers/.installed:
	test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	.venv-peers/bin/pip install --quiet 'llmcompressor==0.14.*'
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
