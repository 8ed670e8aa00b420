# Every command of the project. `make` alone lists them.

PYTHON   ?= python3
PIP_ARGS ?=
SCALE    ?= quick
STUDY    ?= training-labels
CHAPTERS ?= $(sort $(wildcard book/*.ipynb))

VENV := .venv
BIN  := $(VENV)/bin
HTML := _build/html/index.html

INSTALLED := $(VENV)/.installed
SOURCES   := _config.yml _toc.yml src/qmri/_sphinx.py \
             $(shell find book -name '.*' -prune -o -type f -print)

.DEFAULT_GOAL := help
.PHONY: help install book test notebooks study bench lint clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## create .venv with the pinned packages and the library

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "The book needs Python 3.11 to 3.14: make book PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The HTML is built from nothing each time, from the outputs stored in the notebooks, so that
# every warning of every page is seen; a warning is an error.
define build
	rm -rf _build
	$(BIN)/jupyter-book build . -W -n --keep-going || { rm -f $(HTML); exit 1; }
endef

book: $(INSTALLED) ## build the book: _build/html/index.html
	$(build)

$(HTML): $(INSTALLED) $(SOURCES)
	$(build)

# One thread for linear algebra: SciPy's optimiser works on vectors of four numbers, and threads
# that wait for each other slow it down several times.
# Threads that wait must not spin. The library asks for that, but in vain where a chapter
# imports PyTorch first.
test notebooks: export OMP_WAIT_POLICY := passive
test: export OPENBLAS_NUM_THREADS := 1
test: $(HTML) ## test the library, the built pages and every notebook
	$(BIN)/python -m pytest tests $(sort $(wildcard book/*.ipynb)) \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout=120

notebooks: $(INSTALLED) ## execute the notebooks and store their outputs (CHAPTERS=book/... for one)
	$(BIN)/python book/_tools/execute.py $(CHAPTERS)

study: $(INSTALLED) ## run STUDY=training-labels, crb-loss, abdomen or brain (SCALE=quick or paper)
	$(BIN)/qmri study $(STUDY) --scale $(SCALE)

bench: $(INSTALLED) ## time the library against SciPy
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

lint: $(INSTALLED) ## check the code style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove everything that was built or installed
	rm -rf _build $(VENV) .pytest_cache book/.pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
