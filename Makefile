# The doors of the project; `make help` lists them.
# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
ARGS ?=
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

help:
	@echo "make quickstart   train on the arithmetic task with the embedded model; ARGS=\"--dry-run\" is passed on"
	@echo "make test         all tests but the slow ones; ARGS=\"-k name\" is passed on"
	@echo "make test-slow    the slow tests"
	@echo "make check        format, lint and types, changing nothing"
	@echo "make format       format the code and mend what the linter can"
	@echo "make clean        remove .venv and what tools have cached here (not your runs)"
	@echo "PYTHON=python3.12 make ...   use that interpreter (3.11 or later) to make .venv"

quickstart: $(STAMP)
	$(BIN)/restem run recipes/arithmetic.toml --out runs/quickstart --resume $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted installation is done again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "restem needs Python 3.11 or later, and '$(PYTHON)' was not found."; \
		echo "Install it, or name another one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "restem needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into $(VENV) (once, a few minutes)"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

.PHONY: help quickstart test test-slow check format clean
