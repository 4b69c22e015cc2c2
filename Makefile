# Every target does its own set-up; see README.md.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BROKER ?= filesystem
SOURCES := $(shell find celery_resilience -name '*.py') setup.cfg pyproject.toml

.PHONY: demo test unit lint build bench clean

demo: $(VENV)/demo-ready
	$(BIN)/python -m example_project.demo --broker $(BROKER)

test: lint build
	$(BIN)/python -m tests.services
	cd tests && ../$(BIN)/pytest -q $(PYTEST_ARGS)

unit: $(VENV)/test-ready
	cd tests && ../$(BIN)/pytest -q unit $(PYTEST_ARGS)

lint: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel is what users get, so that it is what the tests run against.
build: $(VENV)/test-ready
	$(BIN)/twine check --strict dist/*

bench: $(VENV)/test-ready
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info

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
	$(BIN)/python -m pip install --quiet '$(firstword $(wildcard dist/*.whl))[redis,postgres]'
	touch $@
