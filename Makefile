# Two commands do everything: `make demo` and `make test`. Both create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HOST ?= 127.0.0.1
PORT ?= 7860
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes of one thread each: files of tests are shared out, a file stays in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo demo-brain docs test test-quiet test-slow lint setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
# In two steps: pip keeps all downloads of a step on disk beside what it installs from them.
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/enn demo search --host $(HOST) --port $(PORT)

demo-brain: setup
	$(BIN)/enn demo brain --host $(HOST) --port $(PORT)

# Pages in build/docs, readable without a server.
docs: setup
	$(BIN)/mkdocs build --quiet

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST)

test-quiet: setup
	@$(PYTEST) -q -p no:cacheprovider

test-slow: setup
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build *.egg-info weights/build weights/*.egg-info .mypy_cache .pytest_cache .ruff_cache
