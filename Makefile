# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
DEMO_OUTPUT ?= demo-output
# One worker per core that this process may use, one thread each: the tests are small, and threads that wait for each other cost
# more than they gain. A file stays with one worker, so that what its tests share is made once.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
PYTEST = $(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations 15
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 MPLBACKEND=Agg

.PHONY: help install demo docs test test-wide test-oldest test-slow test-company test-app gpu-check dist test-wheel lint format tables pictures clean

help:
	@echo "make demo       continue, fine-tune and use the small SPADE of checkpoints/ on text that every Python installation carries"
	@echo "make test       the test suite, one case of each kind, on all cores (make test-wide: the other cases)"
	@echo "make test-slow  every test that needs neither an accelerator nor a network"
	@echo "make test-company  the programs of other projects (TRL, sentence-transformers, lm-eval ...) around these models"
	@echo "make test-app   the page of hf-hybrid app in a browser (needs Chromium)"
	@echo "make test-oldest  the same as make test, with the oldest Transformers and libraries that are supported, in $(OLDEST)"
	@echo "make gpu-check  tests and measurements on the accelerator of this machine, in eight minutes; writes docs/guides/gpu.md"
	@echo "make lint       ruff and mypy (make format: let ruff rewrite)"
	@echo "make docs       the documentation as a site in site/, without a network"
	@echo "make tables     the tables in README.md and docs/, the stub and the index of options, from the records"
	@echo "make pictures   the examples, with what they print, and the screenshot of the page (needs Chromium), after a checkpoint has changed"
	@echo "make dist       wheel and source distribution in dist/ (make test-wheel: the README with the wheel in a new environment)"
	@echo "make install    only the virtual environment in $(VENV)"

# $(1): folder of the environment, $(2): file of versions.
define make_environment
@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is %s. Set PYTHON=..." % sys.version.split()[0])'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --upgrade pip
$(1)/bin/python -m pip install --quiet --constraint $(2) torch
$(1)/bin/python -m pip install --quiet --constraint $(2) --editable ".[all]"
@touch $(1)/.installed
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make_environment,$(VENV),constraints.txt)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call make_environment,$(OLDEST),constraints-oldest.txt)

install: $(VENV)/.installed

demo: install
	$(BIN)/python -m hf_hybrid.recipes.demo --output_dir $(DEMO_OUTPUT)

test: install
	$(PYTEST)

test-wide: install
	$(PYTEST) -m "wide and not (slow or gpu or network or company or browser)"

test-oldest: BIN := $(OLDEST)/bin
test-oldest: $(OLDEST)/.installed
	$(PYTEST)

test-slow: install
	$(PYTEST) -m "not (gpu or network or company or browser)"

test-company: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[company]"
	$(PYTEST) -m company tests/company

test-app: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(PYTEST) -m browser tests/browser
	$(PYTEST) tests/recipes/test_app.py tests/recipes/test_app_page.py

gpu-check: install
	$(BIN)/python benchmarks/gpu_check.py

dist: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[release]"
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

test-wheel: dist
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	build/wheel/bin/python tests/first_snippets.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

tables: install
	$(BIN)/python tests/test_architecture_tables.py

# What the examples print goes to examples-output/*.txt, from where it is copied into examples/README.md by hand.
pictures: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	mkdir -p examples-output
	for name in $(basename $(notdir $(wildcard examples/*.py))); do \
		echo $$name; $(TEST_ENVIRONMENT) $(BIN)/python examples/$$name.py > examples-output/$$name.txt || exit 1; done
	cp examples-output/*.png examples/images/
	$(BIN)/python docs/_site/screenshot.py

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist site examples-output
