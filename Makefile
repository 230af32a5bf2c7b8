# Two commands do all the set-up: `make demo` and `make test`. Both make .venv from nothing and may be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
SOURCES := torchsnapshot tools examples benchmarks tests
DEMO_ROOT ?= build/demo
PYTEST_FLAGS ?= -n auto --maxprocesses 4
BENCH_FLAGS ?=

.DELETE_ON_ERROR:
.PHONY: help demo test bench lint typecheck format clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(VENV)/.installed ## train a small GPT, go back in its history, retain, gc, verify (about two minutes)
	@rm -rf $(DEMO_ROOT)
	@$(BIN)/python -W "ignore:Failed to initialize NumPy" examples/train_gpt.py --root $(DEMO_ROOT)
	@echo; echo "Look at it yourself: $(BIN)/torchsnapshot ls $(DEMO_ROOT)"

test: $(VENV)/.installed-test ## run all tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

bench: $(VENV)/.installed-bench ## targets beside peers and the machine's limits: docs/benchmarks.md (half an hour)
	@$(BIN)/python -W ignore -m benchmarks $(BENCH_FLAGS)

lint: $(VENV)/.installed-lint ## ruff: the rules of the code and its format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

typecheck: $(VENV)/.installed-lint ## mypy, strict
	$(BIN)/mypy

format: $(VENV)/.installed-lint ## sort imports, apply safe fixes, format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) .bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps live in the environment: remove it and all is done again. A stamp is touched last, so that an interrupted
# installation is repeated.
$(VENV)/.created:
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "torchsnapshot needs Python 3.10 or newer")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing torchsnapshot and what it needs (a few minutes the first time) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need, servers included ..."
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@

# Without it there is no plot, but all figures: a machine without a network can still measure.
$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "Installing what draws the plot ..."
	@if $(PIP_INSTALL) -e '.[bench]'; then touch $@; else echo "... which failed: there will be no plot"; fi

$(VENV)/.installed-lint: $(VENV)/.installed
	@echo "Installing the linters ..."
	@$(PIP_INSTALL) -e '.[lint]'
	@touch $@
