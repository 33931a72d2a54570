# Everything runs in .venv, made on first use. PYTHON=… picks the interpreter (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# pip compiles the 17,000 modules on one core, compileall on all of them. It fails on files that packages ship as
# templates or for other versions of Python, which nothing imports; hence `|| true`.
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
COMPILE := python -m compileall -qq -j 0
PYTEST := $(BIN)/pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder
# The tests start hundreds of processes, which read modules that the first one has compiled.
unexport PYTHONDONTWRITEBYTECODE
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.DEFAULT_GOAL := help
.PHONY: bench-client bench-core soak help install demo test lint docs unit clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml versions/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --constraint versions/tested.txt --editable .
	$(BIN)/$(COMPILE) $(VENV)/lib || true
	@touch $@

$(VENV)/installed-dev: pyproject.toml versions/tested.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --constraint versions/tested.txt --editable '.[dev,docs]'
	$(BIN)/$(COMPILE) $(VENV)/lib || true
	@touch $(VENV)/installed $@

$(OLDEST)/installed-dev: pyproject.toml versions/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/$(INSTALL) --constraint versions/oldest.txt --editable '.[dev]'
	$(OLDEST)/bin/$(COMPILE) $(OLDEST)/lib || true
	@touch $@

install: $(VENV)/installed  ## Virtual environment with the `redline` command

demo: install  ## The main job on a real model: two configurations, searched, swept and drawn into results/demo
	$(BIN)/redline sweep --preset demo --out results/demo

.PHONY: bench-search
bench-search: $(VENV)/installed-dev  ## The search against a queue of known capacity: found and true, seed by seed
	$(BIN)/python -m tests.perf.bench_search

.PHONY: bench-simulation
bench-simulation: $(VENV)/installed-dev  ## CPU time and memory of simulations in virtual time: results/bench-simulation.json
	$(BIN)/python -m tests.perf.bench_simulation

.PHONY: bench-statistics
bench-statistics: $(VENV)/installed-dev  ## Intervals and verdicts against simulations of known truth: results/bench-statistics.json
	$(BIN)/python -m tests.perf.bench_statistics

.PHONY: sim-check
sim-check: $(VENV)/installed-dev  ## The latency model against published measurements, DATA=FILE: results/sim-check.json
	$(BIN)/python -m tests.perf.sim_check $(DATA)

test: lint unit  ## The whole suite: linters, types, import contracts, tests

# The site is built here and not among the tests: links and docstrings are checked like code, in seconds, before the tests.
lint: $(VENV)/installed-dev  ## Ruff, mypy, import-linter, the documentation site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target types site imports

.PHONY: types site imports
types: $(VENV)/installed-dev
	$(BIN)/mypy

site: $(VENV)/installed-dev
	$(MKDOCS) --quiet

imports: $(VENV)/installed-dev
	$(BIN)/lint-imports

docs: $(VENV)/installed-dev  ## The documentation site in build/site; every warning is an error
	$(MKDOCS)
	@echo "site: build/site/index.html (its search needs a server: python -m http.server -d build/site)"

.PHONY: docs-commands
docs-commands: $(VENV)/installed-dev  ## The commands of the documentation that take minutes, PAGES=…: results/docs-commands.json
	$(BIN)/python -m tests.perf.docs_commands

unit: $(VENV)/installed-dev  ## All tests, in a worker on each core, with the coverage of the scheduler's core
	$(PYTEST) tests/engine/core --cov=engine.core --cov-report=term --cov-fail-under=90
	$(PYTEST) --ignore=tests/engine/core

.PHONY: test-fast
test-fast: $(VENV)/installed-dev  ## The tests without the files that take 20 s or more, for the inner loop
	$(PYTEST) -m 'not slow'

.PHONY: test-oldest
test-oldest: $(OLDEST)/installed-dev  ## Tests of models and workers with the oldest torch, transformers and triton: versions/oldest.txt
	$(OLDEST)/bin/pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder tests/engine/model tests/engine/worker

.PHONY: test-triton
test-triton: $(VENV)/installed-dev  ## Every Triton kernel against torch in the interpreter, all families of models with them, and the GPU check
	REDLINE_TEST_TRITON=1 $(PYTEST) tests/engine/kernels/triton tests/engine/worker/test_device_*.py tests/engine/worker/test_triton_*.py \
		tests/gpu

.PHONY: aot rooflines
aot: $(VENV)/installed-dev  ## Registers, spills and shared memory of all Triton kernels for five targets, no GPU: results/aot.json
	$(BIN)/python -m tests.perf.aot

rooflines: $(VENV)/installed-dev  ## The least time of a step of Llama-3.1-8B on an H100, computed: results/rooflines.json
	$(BIN)/python -m tests.perf.rooflines

.PHONY: gpu-check gpu-wheels
gpu-check: $(VENV)/installed-dev  ## Everything that needs a GPU, in 6 minutes, STAGE=1 or 2: results/gpu-check; one line without a GPU
	$(BIN)/python -m tests.gpu.check --stage $(or $(STAGE),1) --out results/gpu-check

gpu-wheels: $(VENV)/installed  ## The wheels that a GPU machine without a network needs: .gpu-wheels
	$(BIN)/python -m tests.gpu.wheels

bench-client: install  ## What load generators report against a server with a known schedule: results/bench-client.json
	$(BIN)/python -m tests.perf.bench_client

.PHONY: bench-generators
bench-generators: install  ## What two generators report together against a known schedule: results/bench-generators.json
	$(BIN)/python -m tests.perf.bench_generators

bench-core: $(VENV)/installed-dev  ## CPU time of the engine itself, no model behind it: results/bench-core.json
	$(BIN)/python -m tests.perf.bench_core

soak: $(VENV)/installed-dev  ## Random load on a real server for MINUTES=60, then: did it leak? results/soak.json
	$(BIN)/python -m tests.perf.soak

.PHONY: faults
faults: $(VENV)/installed-dev  ## What clients see when parts fail, and what isn't given back: results/faults.json
	$(BIN)/python -m tests.perf.faults

.PHONY: bench-limits
bench-limits: install  ## What bodies that are far too long cost a server and its other clients: results/bench-limits.json
	$(BIN)/python -m tests.perf.bench_limits

.PHONY: bench-streams bench-pause
bench-streams: install  ## 1,000 streams at once and bodies of 40 MB: what is lost, memory, time of /health: results/bench-streams.json
	$(BIN)/python -m tests.perf.bench_streams

bench-pause: install  ## Gaps of 16 streams while long prompts come in, beside vLLM (VLLM_PYTHON=…): docs/figures/bench-pause.png
	$(BIN)/python -m tests.perf.bench_pause

.PHONY: bench-structured
bench-structured: install  ## CPU time and ITL with and without grammars, and the cost of a mask, MODEL=… ROUNDS=12: results/bench-structured.json
	$(BIN)/python -m tests.perf.bench_structured

.PHONY: check-deploy
check-deploy: $(VENV)/installed-dev  ## Dockerfile, Compose files, Kubernetes manifests and Ray cluster: linter, schemas, what they name
	$(PYTEST) tests/deploy

.PHONY: fuzz-api
fuzz-api: $(VENV)/installed-dev  ## schemathesis over the server's OpenAPI document, EXAMPLES=2000: results/fuzz-api.json
	$(BIN)/python -m tests.perf.fuzz_api

.PHONY: interop
interop: $(VENV)/installed  ## Clients such as openai, litellm, lm-eval, unchanged against the server, CLIENTS=…: results/interop.json
	$(BIN)/python -m tests.interop

.PHONY: bench-share
bench-share: install  ## How much of a step passes outside the device, by model size, V1 and V0: docs/figures/bench-share.png
	$(BIN)/python -m tests.perf.bench_share

.PHONY: bench-ranks
bench-ranks: install  ## Bytes and time to tell the ranks of a step, V1 and V0, TP 2 and 4: docs/figures/bench-ranks.png
	$(BIN)/python -m tests.perf.bench_ranks

.PHONY: bench-stages
bench-stages: install  ## One rank, TP 2 and PP 2 on the same cores: results/bench-stages.json
	$(BIN)/python -m tests.perf.bench_stages

.PHONY: bench-cpu
bench-cpu: install  ## Redline on the CPU beside vLLM, OpenVINO and llama.cpp, where named: results/bench-cpu.json
	$(BIN)/python -m tests.perf.bench_cpu

.PHONY: bench-neighbor
bench-neighbor: install  ## Redline and vLLM (VLLM_PYTHON=…) on the CPU beside another program on its cores: docs/figures/bench-neighbor.png
	$(BIN)/python -m tests.perf.bench_neighbor

.PHONY: bench-rates
bench-rates: install  ## The highest sustained rate of Redline and vLLM (VLLM_PYTHON=…) on this CPU: results/bench-rates
	$(BIN)/python -m tests.perf.bench_rates

.PHONY: bench-validity
bench-validity: install  ## What a profile of this machine predicts beside what is measured, 40 minutes: docs/figures/bench-validity.png
	$(BIN)/python -m tests.perf.bench_validity

.PHONY: parity
parity: $(VENV)/installed-dev  ## Every family of models against plain transformers: results/parity.json
	$(BIN)/python -m tests.perf.parity

.PHONY: bench-load
bench-load: install  ## Seconds and peak memory of loading 2 GB, beside transformers: results/bench-load.json
	$(BIN)/python -m tests.perf.bench_load

.PHONY: bench-start
bench-start: install  ## Seconds and CPU seconds of a CPU server's start to its first token: results/bench-start.json
	$(BIN)/python -m tests.perf.bench_start

.PHONY: bench-kv-transfer
bench-kv-transfer: install  ## ITL and TTFT with prefill and decode replicas, beside --dp 2: docs/figures/bench-kv-transfer.png
	$(BIN)/python -m tests.perf.bench_kv_transfer

.PHONY: bench-routing
bench-routing: install  ## Routing by prefix beside least-loaded and random, two replicas: results/bench-routing.json
	$(BIN)/python -m tests.perf.bench_routing

.PHONY: bench-replicas
bench-replicas: $(VENV)/installed-dev  ## Replicas killed every 5 s, added and drained under load: results/bench-replicas.json
	$(BIN)/python -m tests.perf.bench_replicas

.PHONY: bench-kv
bench-kv: install  ## Conversations of four times the KV cache, with and without --kv-spill: docs/figures/bench-kv.png
	$(BIN)/python -m tests.perf.bench_kv

.PHONY: profile-cpu accuracy-cpu
profile-cpu: install  ## A step of the fused stack against the machine's limit: results/profile-cpu.json, docs/figures/
	$(BIN)/python -m tests.perf.profile_cpu

accuracy-cpu: install  ## Perplexity and top-1 agreement of the fused stack's forms: results/accuracy-cpu.json
	$(BIN)/python -m tests.perf.accuracy_cpu

.PHONY: train-vision eval-vision
train-vision: $(VENV)/installed-dev  ## Tower and connector of smollm2-135m-vision, on easy-VQA: datasets/vision-model
	$(BIN)/python -m training

eval-vision: $(VENV)/installed-dev  ## Held-out questions with own and exchanged pictures, over HTTP: results/eval-vision.json
	$(BIN)/python -m tests.perf.eval_vision

.PHONY: bench-vision
bench-vision: install  ## Images on V1, V0 and vLLM, offline throughput by repeats: results/bench-vision
	$(BIN)/python -m tests.perf.bench_vision

.PHONY: bench-mm-stall
bench-mm-stall: install  ## Decode steps while pictures are processed, V1 and V0; pictures/s of the pool: docs/figures/bench-mm-stall.png
	$(BIN)/python -m tests.perf.bench_mm_stall

.PHONY: page-figures
page-figures: $(VENV)/installed-dev  ## Pictures of the server's page and the dashboard under load, 6 minutes; needs chromium, prometheus: docs/figures
	$(BIN)/python -m tests.perf.page_figures

clean:  ## Remove the virtual environments and caches, not results
	rm -rf $(VENV) $(OLDEST) .interop build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
