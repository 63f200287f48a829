# Two commands do everything: `make serve` and `make test`. Both set up .venv when it is missing or out of date.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
ARGS   ?=

.PHONY: serve test check format clean

serve: $(VENV)/serve.stamp
	@$(BIN)/herd pull cria >/dev/null
	@$(BIN)/herd serve $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("herd needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

NATIVE := $(wildcard herd/ops/native/*.cpp herd/ops/native/*.h herd/ops/native/*.inl)

$(VENV)/serve.stamp: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/serve.stamp
