# The two commands are `make demo` and `make test`; each installs what it needs.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
HARNESS := .venv/installed-lm-eval
TEST_FLAGS ?= -n 2
BENCH_FLAGS ?=

.PHONY: demo test test-slow harness test-harness bench-small lint format clean

demo: $(INSTALLED)
	$(BIN)/python launch/run.py --config=experiments/quickstart.py \
	  --workdir=runs/quickstart

test: $(INSTALLED)
	$(BIN)/python -m pytest $(TEST_FLAGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest $(TEST_FLAGS) -m 'slow and not gpu and not network'

# lm-evaluation-harness: half a gigabyte, so that only what needs it installs it.
harness: $(HARNESS)

test-harness: $(HARNESS)
	$(BIN)/python -m pytest tests/evaluation/harness_test.py \
	  tests/experiments/lm_eval_test.py

# Small models on generated tasks: experiments/results/small/README.md.
# BENCH_FLAGS=--seeds=3 or --only=hope,mqar; see experiments/bench_small.py.
bench-small: $(INSTALLED)
	$(BIN)/python experiments/bench_small.py $(BENCH_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Removes what can be made again; keeps the runs.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.cfg pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11." \
	    "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear .venv
	@echo 'Installing the pinned dependencies into .venv (once).'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt --no-build-isolation -e '.[test,tokenizers]'
	@touch $@

$(HARNESS): $(INSTALLED)
	@echo 'Installing lm-evaluation-harness into .venv (once).'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt --no-build-isolation -e '.[lm-eval]'
	@touch $@
