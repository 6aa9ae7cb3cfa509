# make demo       installs the package and runs the embedded example
# make test       all tests
# make test-fast  the tests that take seconds
# make check      format, lint and types
# make docs       the documentation, with warnings as errors
# make clean      removes what these targets made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --constraint constraints.txt --editable
CODE := src tests benchmarks examples tools
# Freed memory is kept for the next tensor: the system's pages cost a third of a forward pass.
KEEP := MALLOC_MMAP_THRESHOLD_=134217728 MALLOC_TRIM_THRESHOLD_=268435456
# Compiled modules are kept whatever the environment says: many tests start processes.
KEEP += PYTHONDONTWRITEBYTECODE=
# Files go to two processes in the order of tests/conftest.py, the longest ones first.
PYTEST := $(KEEP) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast check docs clean

demo: $(VENV)/demo
	$(BIN)/discl demo

test: $(VENV)/installed
	$(PYTEST)

test-fast: $(VENV)/installed
	$(PYTEST) -m "not slow and not ray and not gpu"

check: $(VENV)/installed
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(VENV)/installed: $(VENV)/demo
	$(INSTALL) '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/demo
	$(INSTALL) '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) runs build
