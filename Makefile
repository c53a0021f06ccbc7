# Every target does its own set-up, the first time and every time; `make help` lists them.
#
#   ARGS=...            more arguments for the command or for pytest: make demo ARGS="--minutes 1"
#   PYTHON=path         the Python for .venv and .venv-engines (else the newest of 3.13, 3.12, 3.11 found)
#   PARITY_PYTHON=path  the Python for .venv-parity   (else the oldest with a CPU build of torch)
#   CHROMIUM=path       the browser for the tests of the page (else the first Chromium on PATH)
#   TORCH="..."         pip arguments that name a CPU build of torch, for the parity tests

.DEFAULT_GOAL := help
.PHONY: help install browser demo test test-long test-engines check bench bench-serve bench-gpu bench-pods lock clean main-environment both-environments engines-environment

PYTHON_FILES := src tests bench environment launch
ARGS ?=

help: ## say what each target does
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | awk -F'\t' '{printf "  make %-13s %s\n", $$1, $$2}'

install: main-environment ## make the environment in .venv; the command is .venv/bin/meshlm

browser: ## install Debian's Chromium for the tests of the page, unless there is one
	@sh environment/browser.sh

demo: main-environment ## train a small GPT-J on this machine's Python library, then sample from it
	@.venv/bin/meshlm demo $(ARGS)

test: both-environments ## run the tests on the newest and on the oldest Python and JAX
	@.venv/bin/python tests/run.py quick $(ARGS)

test-long: both-environments ## run the tests that take long: fuzzing, soak, many kills
	@.venv/bin/python tests/run.py long $(ARGS)

test-engines: engines-environment ## run the templates of launch/ on real Ray, SLURM, nginx and Caddy
	@.venv-engines/bin/python -m pytest tests/engines -q $(ARGS)

check: main-environment ## check format, lint, types and the levels of the imports
	@.venv/bin/ruff format --check $(PYTHON_FILES)
	@.venv/bin/ruff check $(PYTHON_FILES)
	@.venv/bin/pyright
	@.venv/bin/python -m pytest -q tests/unit/test_levels.py

bench: both-environments ## train the same shape with MeshLM and with torch and compare
	@.venv/bin/python bench/train.py $(ARGS)

bench-serve: both-environments ## decode the same weights with MeshLM, torch and CTranslate2 and compare
	@.venv/bin/python bench/serve.py $(ARGS)

bench-gpu: both-environments ## on a machine with a GPU: parity, training and decoding against torch
	@.venv/bin/python bench/gpu.py $(ARGS)

bench-pods: main-environment ## compile GPT-J for pods that are not here and write docs/pods.md again
	@.venv/bin/python bench/pods.py $(ARGS)

lock: ## write the locks again after a change of pyproject.toml (newest of all: ARGS=--upgrade)
	@sh environment/prepare.sh lock $(ARGS)

clean: ## remove the environments and all caches
	rm -rf .venv .venv.lock .venv-parity .venv-parity.lock .venv-engines .venv-engines.lock build dist
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find src tests bench environment -name __pycache__ -type d -prune -exec rm -rf {} +

main-environment:
	@sh environment/prepare.sh main

both-environments:
	@sh environment/prepare.sh parity

engines-environment:
	@sh environment/prepare.sh engines
	@sh environment/engines.sh
