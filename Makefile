# Every path is relative and every command goes through .venv/bin/python: make cannot hold a path with spaces in
# a target, and the first line of .venv/bin/pip cannot either.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo   set up, train a head on the testbed, sample with and without guidance, compare"
	@echo "make test   set up, run all tests, one process a core"
	@echo "make lint   set up, check style, format, types and the direction of imports"
	@echo "make clean  remove the virtual environment and caches (runs/ stays)"
	@echo ""
	@echo "Set-up makes .venv here and installs into it; it is done once, and again when pyproject.toml or"
	@echo "constraints.txt change. Another interpreter: PYTHON=python3.12 make demo"

demo: $(STAMP)
	@$(RUN) -m sample.demo $(ARGS)

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command as run; run()"

# The stamp comes last: an installation that was interrupted is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "error: expected Python 3.11 or newer as '$(PYTHON)', found no such command;" \
	       "install it, or name another: PYTHON=python3.12 make demo" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: expected Python 3.11 or newer, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1);" \
	       "name another: PYTHON=python3.12 make demo" >&2; exit 1; }
	@echo "Setting up $(VENV) (once, a few minutes) ..."
	@"$(PYTHON)" -m venv $(VENV) || { \
	  echo "error: Python could not make a virtual environment in $(VENV);" \
	       "on Debian and Ubuntu install python3-venv, then try again" >&2; exit 1; }
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install -c constraints.txt -e '.[all]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
