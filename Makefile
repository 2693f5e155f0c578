# Each target does all of its set-up in a local virtual environment (.venv); see .ci/venv.
VENV ?= .venv
# Each test worker may hold torch and the compiler in memory (about 1 GiB), so few of them.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
export VENV

.PHONY: help demo test lint format check clean

help:
	@echo "make demo    one MoE layer from weights to output, step by step"
	@echo "make test    the test suite (PYTEST_ARGS='-k cache' to choose)"
	@echo "make lint    ruff and mypy --strict"
	@echo "make format  rewrite the code in the project's format"
	@echo "make check   lint, then test"
	@echo "make clean   remove .venv and the tools' caches"

demo:
	@.ci/venv demo
	@$(VENV)/bin/python -m moejit demo

test:
	@.ci/venv test
	@$(VENV)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint:
	@.ci/venv dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format:
	@.ci/venv dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

check: lint test

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
