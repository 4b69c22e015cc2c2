# Every target does its own set-up; see README.md.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BROKER ?= filesystem
SOURCES := $(shell find celery_resilience -name '*.py' -o -name '*.lua') setup.cfg pyproject.toml

.PHONY: demo help test unit lint build docs bench matrix compat clean

demo: $(VENV)/demo-ready ## the shop has the same bad day twice; BROKER=redis or rabbitmq
	$(BIN)/python -m example_project.demo --broker $(BROKER)

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile

test: lint build ## everything; PYTEST_ARGS='-k word'
	$(BIN)/python -m tests.services
	cd tests && ../$(BIN)/pytest -q --numprocesses 5 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

unit: $(VENV)/test-ready ## what needs no server, in seconds
	cd tests && ../$(BIN)/pytest -q unit $(PYTEST_ARGS)

lint: $(VENV)/test-ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The wheel is what users get, so that it is what the tests run against.
build: $(VENV)/test-ready ## the wheel
	$(BIN)/twine check --strict dist/*

docs: $(VENV)/test-ready ## the documentation, in docs/_build
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

bench: $(VENV)/test-ready ## what it costs, against plain Celery
	$(BIN)/python -m benchmarks

matrix: build ## each Celery on each Python; MATRIX_ARGS=. runs all tests there
	$(BIN)/python -m tests.matrix $(MATRIX_ARGS)

compat: build ## the tests of Celery and celery-batches, with every task resilient
	$(BIN)/python -m tests.compat $(COMPAT_ARGS)

clean: ## remove all of this
	rm -rf $(VENV) .matrix .compat build dist *.egg-info docs/_build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo-ready: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[redis,postgres,django]'
	touch $@

$(VENV)/test-ready: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --group dev
	rm -rf dist build
	$(BIN)/python -m build --outdir dist . >/dev/null
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(BIN)/python -m pip install --quiet "$$(echo dist/*.whl)[redis,postgres,mysql]"
	touch $@
