# Two commands do everything on a fresh machine: `make repro` and `make test`. Both set up .venv when needed, and only then.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Of helm-web's page.
PORT ?= 8000
READY := $(VENV)/.ready

.PHONY: repro test bench setup ui helm-web lock clean

repro: setup  ## run the five stages that params.yaml, the code or the data ask for
	source $(BIN)/activate && dvc repro

test: setup  ## cheap tests first, slow ones after them
	source $(BIN)/activate && python -m pytest

bench: setup  ## measure speed and memory side by side: close everything else first
	source $(BIN)/activate && python -m benchmarks

ui: setup  ## compare runs in the browser
	source $(BIN)/activate && mlflow ui

helm-web: setup  ## HELM's page of the last evaluation, with its pictures, in the browser
	source $(BIN)/activate && vlm-vqa helm-web --port $(PORT)

setup: $(READY)

# The stamp is written last: an interrupted set-up is simply done again.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; install Python 3.11 or call make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Setting up $(VENV): about 7 GB and 5 minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip check
	@touch $@

lock: setup  ## rewrite constraints.txt from what is installed
	@{ echo '# The exact versions of everything that is installed: `make lock` writes this file from .venv.'; \
	   $(BIN)/python -m pip list --format=freeze --exclude vlm-vqa --exclude pip; } > constraints.txt

clean:  ## remove what runs have made; .venv and the MLflow store stay
	rm -rf data/records data/features data/features.parts models checkpoints benchmark_output helm-web
