# The door to everything: `make help` lists the targets.
# Variables: PYTHON (which Python makes the environment), VENV (where it lies), OUT (where `make demo` writes), MINUTES.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo chat serve test test-all check format bench train-tiny clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make the environment in .venv (every other target does this first)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("qwenvl needs Python 3.10 or newer, and this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "cannot make a virtual environment: on Debian, apt-get install python3-venv"; exit 1; }
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(RUN) -m compileall -q -j 0 $(VENV)/lib src >/dev/null || true # on all cores, as pip would not
	@touch $@

demo: $(READY) ## the whole path on a picture drawn here: question, answer, boxes, into demo-out/
	$(RUN) -m qwenvl.cli demo --out $(OUT)

chat: $(READY) ## talk to the embedded model in the terminal
	$(RUN) -m qwenvl.cli chat

serve: $(READY) ## the embedded model's page and API, at http://127.0.0.1:8000
	$(RUN) -m qwenvl.cli serve --web

test: $(READY) ## the tests (a few minutes)
	$(RUN) -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(READY) ## the tests, slow ones too
	$(RUN) -m pytest -n auto --dist worksteal

check: $(READY) ## formatting, lint, types, the direction of imports
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest tests/test_architecture.py -k 'not by_itself'

format: $(READY) ## put the formatting right
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(READY) ## speed and memory, beside the device's limits: minutes on a GPU, small sizes without one
	$(RUN) -m qwenvl.cli bench

train-tiny: $(READY) ## train the small model, or go on with it, in build/train-tiny (MINUTES=8 stops after as many)
	$(RUN) -m qwenvl.training.recipes.tiny --out build/train-tiny $(if $(MINUTES),--max-minutes $(MINUTES))

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist $(OUT)
