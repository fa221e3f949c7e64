# make serve       install what is missing, pull the default model, serve it   (ARGS="--model-path ...")
# make test        every test                                                  (ARGS="-k name")
# make unit        the tests that need neither network nor processes
# make check       what CI runs: format, lint, types, stubs, every test
# make format      put the code into shape
# make stubs       write the gRPC stubs again
# make load        a small load against a running server
# make clean       remove .venv and caches; pulled models stay
.DEFAULT_GOAL := help
.PHONY: help install serve test unit check lint types format stubs load clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

help:
	@grep -E '^# make' Makefile | cut -c3-

$(STAMP): pyproject.toml constraints.txt install.sh
	./install.sh "$(PYTHON)"
	@touch $@

install: $(STAMP)

serve: $(STAMP)
	@exec $(BIN)/shoal serve $(ARGS)

# tests/conftest.py says what runs beside what
test: $(STAMP)
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder --durations=25 $(ARGS)

unit: $(STAMP)
	$(BIN)/pytest tests/unit -n auto --dist worksteal $(ARGS)

# All of it whatever fails, the types beside the tests, and pytest's summary at the end.
check: $(STAMP)
	@$(MAKE) --no-print-directory --keep-going --jobs=2 lint types test

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYTHON=$(BIN)/python protos/generate.sh --check

types: $(STAMP)
	nice $(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

stubs: $(STAMP)
	PYTHON=$(BIN)/python protos/generate.sh

load: $(STAMP)
	$(BIN)/python -m loadtest.scenario $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
