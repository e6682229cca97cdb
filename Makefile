# Everything runs in .venv, made here with the versions that constraints.txt pins. Each target may be run again:
# what is up to date is left alone.
#
#   make quickstart   install, prepare a bundled text, pretrain a small GPT on two ranks
#   make test         install with the development tools, lint, type-check, test
#   make proof        the tests with their full counts (long)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: quickstart install install-dev lint test proof clean help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml setup.py constraints.txt

# One thread a process: ranks and tests that share cores are several times slower with more.
export OMP_NUM_THREADS ?= 1
# The pins hold in isolated build environments too, so that nothing resolves an unpinned torch.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests are shared out to as many processes as there are cores. Many start ranks of their own, so that more than a few
# processes need more memory than they save time.
WORKERS ?= -n $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8))) --dist worksteal

DATA := runs/data/shakespeare

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "megalm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing)." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) -m venv failed. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

# The virtual environment holds for the base and the development install; each has a stamp of its own.
$(VENV)/.installed: $(VENV)/.made $(INPUTS)
	@echo "Installing megalm into $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(INPUTS)
	@echo "Installing megalm and its development tools into $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

# Not at the first training, where it would look like a hang. Without a compiler it says so, and torch computes.
$(VENV)/.native: $(VENV)/.installed $(shell find csrc megalm/native -type f -not -name '*.pyc' -not -path '*/lib/*')
	@echo "Building native code (the first time takes a minute or two)"
	@$(BIN)/megalm doctor --build
	@touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

quickstart: $(VENV)/.native
	@test -e $(DATA)/manifest.json || $(BIN)/megalm data prepare examples/data/shakespeare.txt --tokenizer byte --out $(DATA)
	@$(BIN)/megalm data baselines $(DATA)
	@$(BIN)/torchrun --nproc-per-node 2 -m megalm.launch examples/quickstart.toml

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/python scripts/typecheck.py

test: lint $(VENV)/.native
	@$(BIN)/python -m pytest $(WORKERS)

proof: lint $(VENV)/.native
	@MEGALM_PROOF=full $(BIN)/python -m pytest $(WORKERS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
