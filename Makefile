# Everything from a bare checkout: `make demo` and `make test`. Each makes venv/ if it is missing.
PYTHON ?= python3
BIN := venv/bin

.PHONY: help setup setup-dev demo test test-slow fuzz sanitize check docs paper reproduce-quick reproduce format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: venv/.runtime  ## make venv/ and install HAMT into it

setup-dev: venv/.dev  ## the same with the tools of tests and checks

demo: setup  ## train a small model on real text and let it write (about 5 minutes)
	$(BIN)/hamt demo

test: setup-dev  ## run the tests on all cores, but for slow ones (about 8 minutes on 2)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto -m "not slow"

test-slow: setup-dev  ## run those that train, compile or start processes (about 8 minutes on 2)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto -m slow

fuzz: setup-dev  ## random command lines, configurations, damaged files (FUZZ_SECONDS, 600)
	$(BIN)/python tests/fuzz/run.py

check: setup-dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not --quiet, with which --strict lets warnings pass.
docs: venv/.docs  ## build the site into site/; open site/index.html (seconds)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

sanitize: setup-dev  ## run the tests of the compiled operator under sanitizers (minutes)
	tests/sanitize.sh

format: setup-dev  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

paper: setup venv/.paper  ## write docs/WHITEPAPER.md from the results, and WHITEPAPER.pdf from it
	$(BIN)/python studies/whitepaper.py
	venv/paper/bin/python studies/whitepaper_pdf.py

reproduce-quick: setup  ## make small published figures again and compare them (15 minutes)
	$(BIN)/python studies/reproduce.py --quick

reproduce: setup  ## run all commands of docs/results, into OUT (reproduced), resumable (days)
	$(BIN)/python studies/reproduce.py --output_dir $(or $(OUT),reproduced)

clean:  ## remove what tests and tools leave behind (venv/ and checkpoints/ stay)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis site
	find . -name __pycache__ -not -path './venv/*' -prune -exec rm -rf {} +

venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("HAMT needs Python 3.11 or later, as in: make PYTHON=python3.12 demo" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv venv

# A stamp is only touched when everything before it went well, so a broken install is taken up again.
venv/.runtime: requirements.txt pyproject.toml | venv/bin/python
	@echo "installing what HAMT needs into venv/ (1 to 3 minutes)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

venv/.dev: requirements-dev.txt venv/.runtime
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# Without HAMT itself: its docstrings are read, not run.
venv/.docs: requirements-docs.txt | venv/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	@touch $@

# pandoc and Typst, in an environment of their own: nothing of HAMT's is touched.
venv/.paper: docs/whitepaper/requirements.txt | venv/bin/python
	$(PYTHON) -m venv venv/paper
	venv/paper/bin/python -m pip install --quiet -r docs/whitepaper/requirements.txt
	@touch $@
