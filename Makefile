# keepwarm's commands. Every path here is relative, so that the checkout may lie anywhere, also where a name has a space.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(shell command -v python3.11 >/dev/null && echo python3.11) python3)
# The environment that the targets build and run in, and what caps it.
ENV := .venv
CONSTRAINTS := constraints.txt
VENV := $(ENV)/bin
PIP := $(VENV)/python -m pip --disable-pip-version-check install --quiet --no-compile
# uv settles in seconds what takes pip minutes, but does not read pip's configuration: where it fails, pip goes on.
UV := $(VENV)/python -m uv pip install --quiet --python $(VENV)/python
# On all cores, which pip and uv do not; what is large and seldom imported is left to its first import.
RARE := transformers/models|scipy|matplotlib|fontTools|networkx|pip|setuptools|tests?|testing|onnx|_inductor|ao|deepspeed|physics|lexers|mypyc?
COMPILE := $(VENV)/python -W ignore -m compileall -qq -j 0 -x '/($(RARE))/' $(ENV)/lib
# Some packages ship templates that are no Python, which is no failure.
INSTALL = { $(PIP) uv && $(UV) -c $(CONSTRAINTS) -e '$(1)'; } || $(PIP) -c $(CONSTRAINTS) -e '$(1)'; $(COMPILE) || true
CORPORA := configs/corpora
DEMO_DATA := runs/demo-data
DOMAINS := en de en.valid de.valid
# The oldest torch that pyproject.toml lets in.
TORCH := 2.11.0
BASE_TESTS := tests/test_commands.py tests/test_extras.py tests/test_tested.py tests/test_configs.py tests/launch/cli/test_cli.py \
  tests/trainer/data/test_indexed.py tests/trainer/data/test_tokenize.py

.PHONY: help demo demo-quick test test-base test-torch test-gpu wheels-gpu test-long lint format bench models docs reference clean

help: ## show this
	@echo "keepwarm: make TARGET"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 14

demo: demo-quick ## English on 8 ranks, a node lost and recovered, German on one with replay, what was forgotten
	@echo "==> losing a node of configs/ci/drill.yaml, against a run that loses none (about 2 minutes)"
	@$(VENV)/keepwarm drill configs/ci/drill.yaml output=runs/demo-drill --kill node:2@12 --fresh
	@echo "==> training configs/jobs/demo-german.yaml (about 3 minutes)"
	@$(VENV)/keepwarm train configs/jobs/demo-german.yaml --force
	@$(VENV)/keepwarm report runs/demo-german

demo-quick: $(ENV)/installed $(DOMAINS:%=$(DEMO_DATA)/%.idx) ## its first part: tensor 2 x pipeline 2 x data 2, on CPU
	@echo "==> training configs/jobs/demo.yaml (about 4 minutes on 2 cores)"
	@$(VENV)/keepwarm train configs/jobs/demo.yaml --force

test: $(ENV)/installed-dev ## all tests but those of test-long, lint among them
	@echo "==> tests, in two processes"
	@$(VENV)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 30 --durations-min 5

test-base: $(ENV)/installed-test ## what an installation without extras can do: commands of the documentation, data, configs
	@echo "==> tests of the base installation"
	@$(VENV)/python -m pytest -p no:xdist --extras test $(BASE_TESTS)

test-torch: ## the ordinary tests with another torch, in an environment of its own: make test-torch TORCH=2.11.0
	@mkdir -p .venv-torch-$(TORCH)
	@file=.venv-torch-$(TORCH)/constraints.txt; [ -f $$file ] || echo "torch==$(TORCH)" > $$file
	@$(MAKE) ENV=.venv-torch-$(TORCH) CONSTRAINTS=.venv-torch-$(TORCH)/constraints.txt test

test-gpu: ## state, faults, losses and speed on the GPU of this machine, as a table in test-gpu.md; the torch of PYTHON, and WHEELS=folder
	@PYTHONPATH=src:. $(PYTHON) -m tests.gpu.run $(if $(WHEELS),--wheels $(WHEELS))

wheels-gpu: ## fill WHEELS=folder with what test-gpu needs beside torch, for a machine without network; for its version: ON=3.12
	@PYTHONPATH=. $(PYTHON) -m tests.gpu.wheels $(WHEELS) $(if $(ON),--python $(ON))

lint: $(ENV)/installed-dev ## format, lint, types, import rules and dead code
	@echo "==> ruff, mypy, import-linter, vulture"
	@$(VENV)/python -m pytest -p no:xdist -q tests/test_lint.py

test-long: $(ENV)/installed-long ## every test but the benchmarks, then the ordinary ones with the oldest torch; the result goes to docs/test-long.md
	@echo "==> all tests (hours)"
	@status=0; $(VENV)/python -m pytest -m "not bench" --extras long 2>&1 | tee $(ENV)/test-long.log || status=$$?; \
	$(MAKE) test-torch 2>&1 | tee $(ENV)/test-torch.log || status=$$?; \
	printf '# make test-long\n\nCommit %s, %s, %s cores:\n\n```\n%s\n```\n\n`make test-torch TORCH=%s`:\n\n```\n%s\n```\n' \
	  "$$(git rev-parse --short HEAD)" "$$(date -u +%F)" "$$(nproc)" "$$(tail -n 1 $(ENV)/test-long.log)" "$(TORCH)" \
	  "$$(grep -E '(passed|failed).* in ' $(ENV)/test-torch.log | tail -n 1)" > docs/test-long.md; exit $$status

format: $(ENV)/installed-dev ## format the code
	@$(VENV)/python -m ruff format .
	@$(VENV)/python -m ruff check --fix .

bench: $(ENV)/installed-dev ## speed against peers in the same run, as JSON
	@for file in tests/bench/*.py; do echo "==> $$file"; $(VENV)/python "$$file"; done

models: $(ENV)/installed-dev ## every dense family of transformers in one and several dimensions, into docs/models.md (an hour)
	@OMP_NUM_THREADS=1 $(VENV)/python -m tests.model_families

docs: $(ENV)/installed-dev ## the documentation as a site in site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(VENV)/python -m mkdocs build --strict --quiet
	@echo "==> site/index.html"

reference: $(ENV)/installed-dev ## the pages that follow from the code: keys of a job, commands
	@$(VENV)/python -m tests.project.reference_pages

clean: ## remove the virtual environment and the demo's outputs
	rm -rf .venv .venv-* site runs/demo runs/demo-drill runs/demo-german $(DEMO_DATA)

$(ENV)/made:
	@command -v "$(PYTHON)" >/dev/null || { echo "keepwarm needs Python 3.11 or newer: apt-get install python3 python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "keepwarm needs Python 3.11 or newer, $(PYTHON) is $$("$(PYTHON)" -V 2>&1): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> creating $(ENV) with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv $(ENV)
	@touch $@

# torch comes first and alone: without its pin, other packages would pull in gigabytes of CUDA.
$(ENV)/torch: $(ENV)/made $(CONSTRAINTS)
	@echo "==> installing torch"
	@$(PIP) "$$(grep '^torch==' $(CONSTRAINTS))"
	@touch $@

$(ENV)/installed: $(ENV)/torch pyproject.toml
	@echo "==> installing keepwarm"
	@$(call INSTALL,.)
	@touch $@

$(ENV)/installed-test: $(ENV)/installed pyproject.toml
	@echo "==> installing pytest"
	@$(call INSTALL,.[test])
	@touch $@

$(ENV)/installed-dev: $(ENV)/torch pyproject.toml
	@echo "==> installing keepwarm with what its tests need"
	@$(call INSTALL,.[dev])
	@touch $(ENV)/installed $(ENV)/installed-test $@

$(ENV)/installed-long: $(ENV)/torch pyproject.toml
	@echo "==> installing keepwarm with what its long tests need"
	@$(call INSTALL,.[long])
	@touch $(ENV)/installed $(ENV)/installed-test $(ENV)/installed-dev $@

$(DEMO_DATA)/tokenizer.json: $(CORPORA)/handbook_en.jsonl.zst $(CORPORA)/handbook_de.jsonl.zst | $(ENV)/installed
	@echo "==> training a tokenizer of 4,096 tokens on the embedded corpus"
	@mkdir -p $(@D)
	@rm -f $@
	@$(VENV)/keepwarm data train-tokenizer $(^:%=--input %) --output $@ --vocabulary-size 4096

$(DEMO_DATA)/%.idx: $(CORPORA)/handbook_%.jsonl.zst $(DEMO_DATA)/tokenizer.json | $(ENV)/installed
	@echo "==> tokenizing $<"
	@rm -f $(@:.idx=).bin $(@:.idx=).json $@
	@$(VENV)/keepwarm data tokenize --input $< --output-prefix $(@:.idx=) --tokenizer $(DEMO_DATA)/tokenizer.json
