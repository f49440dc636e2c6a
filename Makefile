PYTHON  ?= python3
PROFILE ?= quick
DATASETS ?=
VENV := .venv
RUN := $(VENV)/bin/python -m
ifneq ($(DATA_ROOT),)
export DATA_ROOT := $(abspath $(DATA_ROOT))
endif

.DEFAULT_GOAL := help
.PHONY: help env reproduce test lab verify report bench notebooks lock clean

help:  ## print this help
	@echo "make TARGET [PROFILE=quick|paper] [DATASETS=mnist,...] [DATA_ROOT=folder]"
	@sed -n 's/^\([a-z]*\):[^#]*## */  \1	/p' $(MAKEFILE_LIST) | expand -t 14

env: $(VENV)/.ready  ## make .venv from requirements.lock, if it is missing or outdated

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --requirement requirements.lock
	$(RUN) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

reproduce: env  ## run all notebooks, regenerate results and figures, print the table of claims
	$(RUN) lib reproduce --profile "$(PROFILE)" --datasets "$(DATASETS)"

test: env  ## unit tests, then the notebooks against their stored outputs, then the numbers
	$(VENV)/bin/ruff check .
	$(RUN) pytest tests --ignore tests/regression
	RESULTS_ROOT=$(CURDIR)/.cache/nbval/results FIGURES_ROOT=$(CURDIR)/.cache/nbval/figures \
	  $(RUN) pytest notebooks --nbval --nbval-cell-timeout=900
	RESULTS_ROOT=$(CURDIR)/.cache/nbval/results $(RUN) pytest tests/regression

lab: env  ## open the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab notebooks

verify: env  ## decode the committed models, evaluate them and compare with the committed numbers
	$(RUN) lib verify --profile "$(PROFILE)" --datasets "$(DATASETS)"

report: env  ## one HTML file of all tables, figures and claims, without code
	$(RUN) lib report --profile "$(PROFILE)" --datasets "$(DATASETS)"

bench: env  ## time relevance, codec and ONNX files; tables in results/bench/
	$(VENV)/bin/python bench/bench_relevance.py
	$(VENV)/bin/python bench/bench_codec.py
	$(VENV)/bin/python bench/bench_export.py

notebooks: env  ## store what `make reproduce` printed in the committed notebooks
	$(RUN) lib store-outputs

lock:  ## pin anew all that pyproject.toml asks for (needs uv)
	uv pip compile --universal --python-version 3.11 --all-extras pyproject.toml --output-file requirements.lock

clean:  ## remove caches and executed copies; results, figures and .venv stay
	rm -rf .cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
