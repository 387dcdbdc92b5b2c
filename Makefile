# `make demo` and `make test` do all of their own set-up from a fresh clone.
PYTHON ?= python3
# A second interpreter for the runtime tests without torch; the first of these that exists and runs.
OTHER_PYTHONS ?= python3.13 python3.12 python3.10 $(wildcard $(HOME)/.pyenv/versions/3.1[023].*/bin/python3)

# Threads of torch that wait must not spin: on few or busy cores that costs more than half the speed.
export OMP_WAIT_POLICY ?= PASSIVE

# Processes that run tests side by side, each with one thread: their models are tiny.
PYTEST_WORKERS ?= 2
PYTEST = $(RUN) -m pytest -n $(PYTEST_WORKERS) --dist loadfile
test test-all test-main test-runtime: export OMP_NUM_THREADS ?= 1

BIN := .venv/bin
TEXTS := build/demo/texts
RUN := $(BIN)/python

.PHONY: compare demo test test-all lint test-main test-runtime texts train clean

demo: .venv/ready texts
	$(RUN) examples/demo/demo.py --texts $(TEXTS)

# The demo's memory beside fine-tuning, kNN-LM, controls and the bound (after `make demo`).
compare:
	$(RUN) benchmarks/compare_demo.py

test: lint test-main test-runtime

test-all: lint texts
	$(PYTEST) -m "slow or not slow"
	$(MAKE) test-runtime

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy examples/*.py examples/demo/*.py benchmarks/*.py

test-main: .venv/ready texts
	$(PYTEST) -m "not slow"

# The part an embedded device installs, on another Python, with neither torch nor onnx.
test-runtime: .venv/ready
	$(RUN) tests/other_python.py $(OTHER_PYTHONS)

texts: .venv/ready
	$(RUN) examples/demo/texts.py $(TEXTS)

# Trains the demo model anew (about half an hour on two free cores); nothing else needs it.
train: .venv/ready
	$(RUN) examples/demo/texts.py --train $(TEXTS)
	$(RUN) examples/demo/train.py $(TEXTS)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,export,faiss,plugin-test,train]'
	touch $@

clean:
	rm -rf .venv .venv-runtime build
