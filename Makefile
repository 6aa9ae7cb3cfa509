# make demo: the embedded example, from nothing to a report.   make test: all tests.
# make check: format, lint and types.   make docs: the site, strictly.   make clean: all that these made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --constraint constraints.txt --editable
CODE := src tests benchmarks examples tools

.PHONY: demo test check docs clean

demo: $(VENV)/demo
	$(BIN)/discl demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

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
