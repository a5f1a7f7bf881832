# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= demo-output
# One worker and one thread per core: the tests are small, and threads that wait for each other cost more than they gain.
WORKERS ?= 2
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 MPLBACKEND=Agg

.PHONY: help install demo test test-slow lint format tables clean

help:
	@echo "make demo       train, fine-tune and use a small SPADE on text that every Python installation carries"
	@echo "make test       the test suite (make test-slow: the slow tests too)"
	@echo "make lint       ruff and mypy (make format: let ruff rewrite)"
	@echo "make tables     the tables of architectures in README.md and docs/, from their records"
	@echo "make install    only the virtual environment in $(VENV)"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is %s. Set PYTHON=..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python -m hf_hybrid.recipes.demo --output_dir $(DEMO_OUTPUT)

test: install
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(WORKERS) --durations 15

test-slow: install
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(WORKERS) -m "slow or not (slow or gpu or network)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: install
	$(BIN)/python tests/test_architecture_tables.py

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist
