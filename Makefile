# make demo   the built-in demo: full cache and two contracts side by side on a small model
# make test   linters, type checker and the test suite (about 20 minutes on 2 slow cores with the installation, of which the compile checks of the kernels take five)
# make lint   linters and type checker only
#
# Each works on a bare machine: it makes .venv and installs the pinned versions of constraints.txt there once.
# PYTHON=python3.12 picks the interpreter, TORCH="torch==2.13.0 --index-url ..." another torch build.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/kvpress demo

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf .venv build dist

# torch comes first and alone: asked for beside the rest, a resolver may pick a build of several GB for a GPU
# that is not there, although a smaller one is on the machine.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
