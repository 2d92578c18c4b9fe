# Two commands do everything on a fresh machine: `make repro` and `make test`. Both set up .venv when needed, and only then.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# pip, or uv, which also brings Python 3.11 where there is none.
INSTALLER ?= pip
# cuda: the wheels that PyPI has, for GPUs and CPUs; cpu: torch's own CPU wheels, without the 4 GB of CUDA libraries.
# An environment that is there keeps its kind.
WHEELS ?= $(or $(shell cat $(READY) 2>/dev/null),cuda)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
# yes: what is installed is requirements.lock, each file compared with its hash; the wheels for cuda only.
LOCKED ?=
# So every CPU with AVX2 gives the same bits: one with AVX512 rounds otherwise. Empty: all instructions that this one has.
SAME_BITS ?= $(if $(shell grep -m1 -ow avx2 /proc/cpuinfo 2>/dev/null),ATEN_CPU_CAPABILITY=avx2 \
  MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2)
# Arguments for pytest, such as TESTS='-m "not slow"'.
TESTS ?=
# Of helm-web's page.
PORT ?= 8000

.PHONY: help repro same-bits test bench docs setup ui experiments helm-web lock audit clean lint

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/\1\t\2/p' Makefile | expand -t 14

repro: setup  ## run the five stages that params.yaml, the code or the data ask for
	source $(BIN)/activate && vlm-vqa unlock --quiet && env $(SAME_BITS) dvc repro

same-bits:
	@echo $(SAME_BITS)

test: setup  ## cheap tests first, slow ones after them, in two processes of one thread
	source $(BIN)/activate && OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	  python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder $(TESTS)

bench: setup  ## measure speed and memory side by side: close everything else first
	source $(BIN)/activate && python -m benchmarks

lint: setup  ## style, spelling, types
	source $(BIN)/activate && ruff check . && ruff format --check . && codespell && ty check

docs: setup  ## build the documentation's site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; with search: python -m http.server --bind 127.0.0.1 --directory site"

ui: setup  ## compare runs in the browser
	source $(BIN)/activate && mlflow ui

helm-web: setup  ## HELM's page of the last evaluation, with its pictures, in the browser
	source $(BIN)/activate && vlm-vqa helm-web --port $(PORT)

experiments: setup  ## compare DVC's experiments in the terminal: learning rate, accuracy, bleu_1
	source $(BIN)/activate && dvc exp show --no-pager --drop '.*' --keep 'Experiment|State|train.learning_rate|accuracy$$|bleu_1'

setup: $(READY)  ## make .venv: INSTALLER=pip or uv, WHEELS=cuda or cpu
	@made=$$(cat $(READY)); made=$${made:-cuda}; [ "$(origin WHEELS)" = file ] || [ "$$made" = "$(WHEELS)" ] || { \
	  echo "$(VENV) has the wheels for $$made, not for $(WHEELS): remove it (rm -r $(VENV)) and call make again." >&2; exit 2; }

# The stamp is written last: an interrupted set-up is simply done again.
# The lock is complete, as `pip check` sees; pip's resolver would want a hash for every extra by itself.
PROJECT = $(if $(LOCKED),--no-deps --no-build-isolation --editable .,--constraint constraints.txt --editable '.[dev]')
$(READY): pyproject.toml constraints.txt
	@case "$(INSTALLER) $(WHEELS)" in "pip cuda" | "pip cpu" | "uv cuda" | "uv cpu") ;; \
	  *) echo "INSTALLER is pip or uv and WHEELS is cuda or cpu, not $(INSTALLER) and $(WHEELS)." >&2; exit 2 ;; esac
	@[ -z "$(LOCKED)" ] || [ "$(WHEELS)" = cuda ] || { echo "requirements.lock has the wheels for cuda, which run on CPUs, too: leave WHEELS or LOCKED out." >&2; exit 2; }
	@echo "Setting up $(VENV) with $(INSTALLER) and the wheels for $(WHEELS): $(if $(filter cpu,$(WHEELS)),less than the,about) 7 GB and 5 minutes, once."
ifeq ($(INSTALLER),uv)
	@command -v uv >/dev/null || { echo "uv is not installed (https://docs.astral.sh/uv); or leave INSTALLER=uv out." >&2; exit 2; }
	uv venv --quiet --allow-existing --seed --python 3.11 $(VENV)
	$(if $(LOCKED),uv pip install --python $(BIN)/python --no-deps --require-hashes --requirement requirements.lock)
	uv pip install --python $(BIN)/python $(if $(filter cpu,$(WHEELS)),--torch-backend cpu) $(PROJECT)
else
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: docs/index.md says how to get it; or name one by make PYTHON=/path/to/python3.11, or install uv and call make INSTALLER=uv." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(LOCKED),$(BIN)/python -m pip install --quiet --progress-bar on --no-deps --require-hashes --requirement requirements.lock)
	$(BIN)/python -m pip install --quiet --progress-bar on $(if $(filter cpu,$(WHEELS)),--extra-index-url $(CPU_WHEELS)) $(PROJECT)
endif
	$(BIN)/python -m pip check
	@echo $(WHEELS) > $@

lock: setup  ## rewrite constraints.txt from what is installed, and requirements.lock, its hashes (needs uv)
	@[ "$(WHEELS)" = cuda ] || { echo "$(VENV) has the CPU wheels: constraints.txt is written from an environment with all (WHEELS=cuda)." >&2; exit 2; }
	@{ echo '# The exact versions of everything that is installed: `make lock` writes this file from .venv.'; \
	   $(BIN)/python -m pip list --format=freeze --exclude vlm-vqa --exclude pip; } > constraints.txt
	uv pip compile --quiet --no-config --python $(BIN)/python --extra dev --constraint constraints.txt --generate-hashes --no-annotate \
	  --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

audit:  ## ask PyPI's advisories about constraints.txt
	PYTHON=$(PYTHON) scripts/audit

clean:  ## remove what runs have made; .venv and the MLflow store stay
	rm -rf data/records data/features data/features.parts data/answers.parts models checkpoints benchmark_output helm-web site
