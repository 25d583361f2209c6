# keepwarm's commands. Every path here is relative, so that the checkout may lie anywhere, also where a name has a space.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(shell command -v python3.11 >/dev/null && echo python3.11) python3)
VENV := .venv/bin
PIP := $(VENV)/python -m pip --disable-pip-version-check install --quiet --no-compile
# uv settles in seconds what takes pip minutes, but does not read pip's configuration: where it fails, pip goes on.
UV := $(VENV)/python -m uv pip install --quiet --python $(VENV)/python
# On all cores, which pip and uv do not; what is large and seldom imported is left to its first import.
RARE := transformers/models|scipy|matplotlib|fontTools|networkx|pip|setuptools|tests?|testing|onnx|_inductor|ao|deepspeed|physics|lexers|mypyc?
COMPILE := $(VENV)/python -W ignore -m compileall -qq -j 0 -x '/($(RARE))/' .venv/lib
# Some packages ship templates that are no Python, which is no failure.
INSTALL = { $(PIP) uv && $(UV) -c constraints.txt -e '$(1)'; } || $(PIP) -c constraints.txt -e '$(1)'; $(COMPILE) || true
CORPORA := configs/corpora
DEMO_DATA := runs/demo-data
DOMAINS := en de en.valid de.valid

.PHONY: help demo demo-quick test test-long lint format bench clean

help: ## show this
	@echo "keepwarm: make TARGET"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 14

demo: demo-quick ## English on 8 ranks, a node lost and recovered, German on one with replay, what was forgotten
	@echo "==> losing a node of configs/ci/drill.yaml, against a run that loses none (about 2 minutes)"
	@$(VENV)/keepwarm drill configs/ci/drill.yaml output=runs/demo-drill --kill node:2@12 --fresh
	@echo "==> training configs/jobs/demo-german.yaml (about 3 minutes)"
	@$(VENV)/keepwarm train configs/jobs/demo-german.yaml --force
	@$(VENV)/keepwarm report runs/demo-german

demo-quick: .venv/installed $(DOMAINS:%=$(DEMO_DATA)/%.idx) ## its first part: tensor 2 x pipeline 2 x data 2, on CPU
	@echo "==> training configs/jobs/demo.yaml (about 4 minutes on 2 cores)"
	@$(VENV)/keepwarm train configs/jobs/demo.yaml --force

test: .venv/installed-dev ## all tests but those of test-long, lint among them
	@echo "==> tests, in two processes"
	@$(VENV)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: .venv/installed-dev ## format, lint, types, import rules and dead code
	@echo "==> ruff, mypy, import-linter, vulture"
	@$(VENV)/python -m pytest -p no:xdist -q tests/test_lint.py

test-long: .venv/installed-long ## every test but the benchmarks; the result goes to docs/test-long.md
	@echo "==> all tests (hours)"
	@status=0; $(VENV)/python -m pytest -m "not bench" 2>&1 | tee .venv/test-long.log || status=$$?; \
	printf '# make test-long\n\nCommit %s, %s, %s cores:\n\n```\n%s\n```\n' "$$(git rev-parse --short HEAD)" \
	  "$$(date -u +%F)" "$$(nproc)" "$$(tail -n 1 .venv/test-long.log)" > docs/test-long.md; exit $$status

format: .venv/installed-dev ## format the code
	@$(VENV)/python -m ruff format .
	@$(VENV)/python -m ruff check --fix .

bench: .venv/installed-dev ## speed against peers in the same run, as JSON
	@for file in tests/bench/*.py; do echo "==> $$file"; $(VENV)/python "$$file"; done

clean: ## remove the virtual environment and the demo's outputs
	rm -rf .venv runs/demo runs/demo-drill runs/demo-german $(DEMO_DATA)

.venv/made:
	@command -v "$(PYTHON)" >/dev/null || { echo "keepwarm needs Python 3.11 or newer: apt-get install python3 python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "keepwarm needs Python 3.11 or newer, $(PYTHON) is $$("$(PYTHON)" -V 2>&1): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> creating .venv with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv .venv
	@touch $@

# torch comes first and alone: without its pin, other packages would pull in gigabytes of CUDA.
.venv/torch: .venv/made constraints.txt
	@echo "==> installing torch"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

.venv/installed: .venv/torch pyproject.toml
	@echo "==> installing keepwarm"
	@$(call INSTALL,.)
	@touch $@

.venv/installed-dev: .venv/torch pyproject.toml
	@echo "==> installing keepwarm with what its tests need"
	@$(call INSTALL,.[dev])
	@touch $@ .venv/installed

.venv/installed-long: .venv/torch pyproject.toml
	@echo "==> installing keepwarm with what its long tests need"
	@$(call INSTALL,.[long])
	@touch $@ .venv/installed-dev .venv/installed

$(DEMO_DATA)/tokenizer.json: $(CORPORA)/handbook_en.jsonl.zst $(CORPORA)/handbook_de.jsonl.zst | .venv/installed
	@echo "==> training a tokenizer of 4,096 tokens on the embedded corpus"
	@mkdir -p $(@D)
	@rm -f $@
	@$(VENV)/keepwarm data train-tokenizer $(^:%=--input %) --output $@ --vocabulary-size 4096

$(DEMO_DATA)/%.idx: $(CORPORA)/handbook_%.jsonl.zst $(DEMO_DATA)/tokenizer.json | .venv/installed
	@echo "==> tokenizing $<"
	@rm -f $(@:.idx=).bin $(@:.idx=).json $@
	@$(VENV)/keepwarm data tokenize --input $< --output-prefix $(@:.idx=) --tokenizer $(DEMO_DATA)/tokenizer.json
