# `make demo` and `make test` do all the set-up that they need.
#   make demo PYTHON=python3.12      another interpreter (3.11 or newer)
#   make test ARGS="-k growth -x"    arguments for pytest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test install lint types docs

demo: install
	$(BIN)/cambia run

test: install
	$(BIN)/pytest -n 2 $(ARGS)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Cambia needs Python 3.11 or newer, $(PYTHON) is %d.%d: name another one with PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/ty check --python $(VENV) src

# Pages that are made from the code.
docs: install
	$(BIN)/python docs/configuration.py
	$(BIN)/python docs/architectures.py
	$(BIN)/python docs/methods.py
