# The two commands: `make quickstart` runs the main job on a machine without a GPU, `make test` passes the tests.
# Each is complete on a new machine that has some Python of 3.12 or newer.

PYTHON ?= $(shell ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python3 2>/dev/null | sort -V | head -n 1)
ifeq ($(strip $(PYTHON)),)
PYTHON := $(firstword $(foreach version,12 13 14,$(shell command -v python3.$(version))) python3)
endif
VENV ?= .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
CLIENTS := $(VENV)-clients
CLIENTS_READY := $(CLIENTS)/.ready
UV := $(RUN)/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.12 --no-strip-extras --generate-hashes \
  --custom-compile-command "make lock"

.PHONY: help quickstart test cover docs faults versions bench bench-gpu scale lint lock clean
help: ## say what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1	\2/' | expand -t 18

quickstart: $(READY) ## ask the demo model a question, on real vLLM
	$(RUN)/gserve chat configs/quickstart.yaml "Write a haiku about the sea." --params '{"temperature": 0, "max_tokens": 60}'

# Tests start hundreds of processes. Without bytecode on disk, each compiles all of gserve, and pytest all of its plugins.
test cover faults: export PYTHONDONTWRITEBYTECODE :=

test: $(READY) $(CLIENTS_READY) ## pass the tests
	$(RUN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder --durations 30 $(ARGS)

cover: $(READY) $(CLIENTS_READY) ## pass the tests, and show which lines of the product they run, in servers too
	rm -f .coverage .coverage.*
	$(RUN)/coverage run -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS) || true
	$(RUN)/coverage combine --quiet
	$(RUN)/coverage report

docs: $(READY) ## build the documentation to site/
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet --strict

faults: $(READY) ## try every fault, for 10 minutes; LONG=1: for an hour
	$(RUN)/python -m tests.faults $(ROWS)

versions: $(READY) ## check several versions of vLLM, in a few minutes each; VERSIONS=all: every one
	$(RUN)/python -m tests.versions $(VERSIONS)

bench: $(READY) ## measure gserve against vLLM, on this machine without a GPU, in 15 minutes
	$(RUN)/python -m benchmarks cpu $(WHAT)

bench-gpu: ## the same on a GPU, in the environment that holds vLLM for it, in 9 minutes; MODEL=8b: the larger one
	python -m benchmarks gpu $(WHAT) --model $(or $(MODEL),1b)

scale: $(READY) ## measure what an item costs a client and 1 to 64 servers, in 10 minutes
	$(RUN)/python -m benchmarks.scale $(WHAT)

lint: $(READY) ## check style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

lock: $(RUN)/uv ## write uv.lock, uv-cpu.lock and uv-clients.lock anew
	$(COMPILE) pyproject.toml --extra cuda --output-file uv.lock
	$(COMPILE) pyproject.toml --extra cpu --extra data --extra dev --override uv-cpu.override --output-file uv-cpu.lock
	$(COMPILE) uv-clients.in --output-file uv-clients.lock
	awk "$$WITHOUT_EXTRAS" uv.lock >uv.lock.new && mv uv.lock.new uv.lock

# pip takes "name[extra]" and "name" for two packages when it checks hashes: what is locked with an extra is locked
# without it too.
define WITHOUT_EXTRAS
function flush() { printf "%s", copy; copy = "" }
/^[^ #]/ { flush(); if (/^[^=]*\[/) { copy = $$0; sub(/\[[^]]*\]/, "", copy); copy = copy "\n" } }
/^    --hash/ && copy { copy = copy $$0 "\n" }
{ print }
END { flush() }
endef
export WITHOUT_EXTRAS

clean: ## remove the environments
	rm -rf $(VENV) $(CLIENTS)

$(RUN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "gserve needs Python 3.12 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet uv

# Compiled now, vLLM starts twice as fast on every later start.
$(READY): uv-cpu.lock pyproject.toml | $(RUN)/uv
	$(UV) pip install --quiet --python $(RUN)/python --no-deps --compile-bytecode -r uv-cpu.lock
	$(UV) pip install --quiet --python $(RUN)/python --no-deps --editable .
	touch $@

# An environment of their own: these change no pin of vLLM, and need neither it nor torch.
$(CLIENTS_READY): uv-clients.lock | $(RUN)/uv
	$(UV) venv --quiet --clear --python $(RUN)/python $(CLIENTS)
	$(UV) pip install --quiet --python $(CLIENTS)/bin/python --no-deps -r uv-clients.lock
	touch $@
