PYTHON  ?= python3
PROFILE ?= quick
DATASETS ?=
SEED ?= 0
PER_CLASS ?= 0
VENV := .venv
RUN := $(VENV)/bin/python -m
# threads that wait for each other sleep: on a busy machine, where they spin, a step of training
# takes twenty times as long; on an idle one it takes a tenth longer
export OMP_WAIT_POLICY ?= passive
export PYTHONPATH := $(CURDIR):$(CURDIR)/notebooks$(if $(PYTHONPATH),:$(PYTHONPATH))
ifneq ($(DATA_ROOT),)
# not abspath, which would take a path with spaces for several
override export DATA_ROOT := $(if $(filter /%,$(firstword $(DATA_ROOT))),$(DATA_ROOT),$(CURDIR)/$(DATA_ROOT))
endif

NOTEBOOKS := $(sort $(basename $(notdir $(wildcard notebooks/[0-9][0-9]-*.ipynb))))
CASES = --profile "$(PROFILE)" --datasets "$(DATASETS)" --seed "$(SEED)" --per-class "$(PER_CLASS)"
NAME = $(PROFILE)$(if $(filter-out 0,$(SEED)),-seed$(SEED))$(if $(filter-out 0,$(PER_CLASS)),-images$(PER_CLASS))
EXECUTED = $(if $(CACHE_ROOT),$(CACHE_ROOT),.cache)/$(NAME)/notebooks

.DEFAULT_GOAL := help
.PHONY: help env link reproduce run-all test test-units test-study test-notebooks test-numbers mutants test-machines spread test-survival test-hostile types lab verify report bench peers notebooks lock clean

help:  ## print this help
	@echo "make TARGET [PROFILE=quick|paper] [DATASETS=mnist,...] [DATA_ROOT=folder] [SEED=0] [PER_CLASS=0]"
	@sed -n 's/^\([a-z-]*\):[^#]*## */  \1	/p' $(MAKEFILE_LIST) | expand -t 16

env: $(VENV)/.ready  ## make .venv from requirements.lock, if it is missing or outdated

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --require-hashes --requirement requirements.lock
	@$(MAKE) --no-print-directory link

# xai_compression by an editable install; lib and study by a .pth file, which Python reads at start.
link:  ## let $(VENV), also one made otherwise, import lib, study and xai_compression from here
	$(RUN) pip install --quiet --no-deps --no-build-isolation --editable .
	@$(VENV)/bin/python -c 'import sys, sysconfig; \
	  path = sysconfig.get_path("purelib") + "/xai-compression-checkout.pth"; \
	  print(*sys.argv[1:], sep="\n", file=open(path, "w"))' "$(CURDIR)" "$(CURDIR)/notebooks"
	@touch $(VENV)/.ready

reproduce: env  ## run all notebooks, regenerate results and figures, print the table of claims
	@$(RUN) study lock $(MAKE) --no-print-directory run-all

# The later notebooks take longest and start first, so that no core waits for them at the end. In
# the quick profile each has a core to itself, in the paper profile one after the other has them all.
FIRST = $(patsubst %,run-%,$(shell echo $(filter-out 09-paper,$(NOTEBOOKS)) | tr ' ' '\n' | sort -r))
LAST = $(patsubst %,run-%,$(filter 09-paper,$(NOTEBOOKS)))
ifeq ($(PROFILE),quick)
MANY = LOKY_MAX_CPU_COUNT=1 $(MAKE) --no-print-directory --jobs=$(shell getconf _NPROCESSORS_ONLN)
else
MANY = $(MAKE) --no-print-directory --jobs=1
endif

run-all:
	@trap 'echo "stopped; run again to go on"; exit 130' INT; \
	$(RUN) study bases $(CASES) && $(MANY) $(FIRST) && \
	$(if $(LAST),$(MAKE) --no-print-directory $(LAST) &&) \
	$(RUN) study claims $(CASES)

run-%: env
	@mkdir -p "$(EXECUTED)"; export STUDY_LEDGER="$$(cd "$(EXECUTED)" && pwd)/$*.written"; \
	$(RUN) study fresh $* $(CASES); case $$? in 0) exit 0;; 1) ;; *) exit 2;; esac; \
	rm -f "$$STUDY_LEDGER"; echo "$* ..."; \
	$(RUN) study execute $* $(CASES) || exit $$?; \
	$(RUN) study stamp $* $(CASES)

# Each part uses one core, so two go at once; each tells all when it is done.
TOGETHER = --jobs=2 $(if $(findstring output-sync,$(.FEATURES)),--output-sync=target)
NBVAL = $(patsubst run-%,nbval-%,$(FIRST) $(LAST))

test: env  ## style and types; unit tests beside notebooks against stored outputs, then the numbers
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	@$(MAKE) --no-print-directory $(TOGETHER) nbval-bases types test-units test-notebooks test-study

# a core each: threads and processes of their own would only wait for those of the other part
test-units test-study test-numbers nbval-%: export LOKY_MAX_CPU_COUNT = 1
test-units: env
	$(RUN) pytest tests --ignore tests/study --ignore tests/regression

test-study: env
	$(RUN) pytest tests/study

test-numbers nbval-%: export RESULTS_ROOT = $(CURDIR)/.cache/nbval/results
test-numbers nbval-%: export FIGURES_ROOT = $(CURDIR)/.cache/nbval/figures
test-notebooks: $(NBVAL) test-numbers

test-numbers: $(filter-out nbval-09-paper,$(NBVAL))
	$(RUN) pytest tests/regression

nbval-bases: env
	@$(RUN) study bases

nbval-09-paper: $(filter-out nbval-09-paper,$(NBVAL))

nbval-%: nbval-bases
	$(RUN) pytest "notebooks/$*.ipynb" --nbval --nbval-cell-timeout=900

mutants: env  ## plant each fault of tests/mutants/ in a copy; NAMES="sign checksum": only some
	$(VENV)/bin/python tests/mutants/run.py $(NAMES)

test-machines: env  ## tests that differ between machines, on other processors and places; TIMES=5
	$(VENV)/bin/python tests/machines.py $(NAMES)

spread: env  ## measure numbers out of training on other processors anew: tests/spread.csv
	$(VENV)/bin/python tests/machines.py --spread

test-survival: env  ## kill `make reproduce` at 20 random moments and start it again; KILLS=20
	$(VENV)/bin/python tests/survival.py

test-hostile: env  ## 10,000 damaged files in place of 1,000
	CODEC_MUTATIONS=10000 $(RUN) pytest tests/test_codec_hostile.py

types: env  ## check the annotations of lib/
	$(RUN) mypy lib

lab: env  ## open the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

verify: env  ## decode the committed models, evaluate them and compare with the committed numbers
	@$(RUN) study verify $(CASES)

report: run-09-paper  ## one HTML file of all tables, figures and claims, without code
	@$(RUN) study report $(CASES)

bench: env  ## time relevance, compression, codec and ONNX files; tables in results/bench/
	$(VENV)/bin/python bench/bench_relevance.py
	$(VENV)/bin/python bench/bench_compress.py
	$(VENV)/bin/python bench/bench_codec.py
	$(VENV)/bin/python bench/bench_export.py

# Their packages do not go together with the study's, so that they have an environment of their own.
PEERS := $(if $(CACHE_ROOT),$(CACHE_ROOT),.cache)/peers

$(PEERS)/.ready: bench/peers/requirements.txt
	$(PYTHON) -m venv "$(PEERS)"
	"$(PEERS)/bin/pip" install --quiet --requirement bench/peers/requirements.txt
	@touch "$@"

peers: env $(PEERS)/.ready  ## files of other coders (NNCodec, GPTQ, ...), for 06-beyond; needs a C++ compiler
	$(RUN) bench.peers.run --python "$(PEERS)/bin/python" --profile "$(PROFILE)" --datasets "$(DATASETS)"

notebooks: env  ## store what `make reproduce` printed in the committed notebooks
	@$(RUN) study store-outputs

lock:  ## pin anew all that pyproject.toml asks for (needs uv), and list the licences
	uv pip compile --universal --no-strip-extras --python-version 3.11 --extra onnx --extra study --extra test \
	  --generate-hashes pyproject.toml --output-file requirements.lock
	$(MAKE) env
	$(VENV)/bin/python .ci/licences.py

clean:  ## remove caches and executed copies; results, figures and .venv stay
	rm -rf .cache .ruff_cache .mypy_cache .hypothesis build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
