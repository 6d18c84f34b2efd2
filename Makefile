# One command sets everything up: `make demo` or `make test`.  `make help` lists the rest.
# Needs Python 3.11 or newer with venv, and GNU make.  Variables that may be set on the command line:
#   PYTHON     the interpreter that the environment is made from             (default python3)
#   VENV       where the environment goes                                    (default .venv)
#   PIP_FLAGS  passed to every pip install, e.g. another index for torch     (default none)
#   WORKERS    processes that the tests are spread over                      (default one per core)
#   OUT        where the demo writes its figures and its ArviZ file          (default out)

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .bench-venv
PIP_FLAGS ?=
WORKERS ?= auto
OUT ?= out

RUN := $(VENV)/bin/python
BENCH := $(BENCH_VENV)/bin/python
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) -c constraints.txt

# The tensors here are small: one thread a process, and the cores go to processes.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# The oldest torch that pyproject.toml allows and the newest that has been tested; `make test` has that of constraints.txt.
OTHER_TORCHES := 2.8.0 2.14.1
ENGINE_TESTS := tests/contract tests/inference/kernels $(addprefix tests/inference/test_,potential.py recorder.py fit.py predictive.py mcmc.py)

.PHONY: help demo test torches lint format check-format types reproduce bench docs tutorials clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo  ## all models on small data: one table, figures in out/
	$(RUN) -m benchmarks.demo --out $(OUT)

test: lint types  ## everything that CI checks: ruff, import arrows, mypy, all tests
	$(ONE_THREAD) $(RUN) -m pytest -n $(WORKERS) --dist worksteal

torches: $(OTHER_TORCHES:%=torch-%)  ## the contract and the engines with the oldest and the newest torch (some GB each, one after the other)

# Where that torch can't be had, it says so and goes on.
torch-%: VENV = .venv-torch-$*
torch-%:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	sed '/^torch==/d' constraints.txt > $(VENV)/constraints.txt
	if $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-cache-dir $(PIP_FLAGS) -c $(VENV)/constraints.txt torch==$* -e '.[test]'; then \
	  $(ONE_THREAD) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -p no:cacheprovider $(ENGINE_TESTS); \
	else echo "torch $* could not be installed: nothing was tested with it"; fi
	rm -rf $(VENV)

lint: $(VENV)/.installed-test  ## ruff (rules and format) and the arrows between the three rooms
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.installed-test  ## mypy
	$(RUN) -m mypy

format: $(VENV)/.installed-test  ## let ruff repair and format the tree
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

reproduce: $(VENV)/.installed-test  ## the published tables, as tests marked slow (hours); what they print goes to RESULTS.md
	$(ONE_THREAD) $(RUN) -m pytest -m slow -n $(WORKERS) --timeout 0 -p tests.records

bench: $(BENCH_VENV)/.installed  ## side by side with all peers, in an environment of their own (hours), into RESULTS.md
	$(ONE_THREAD) $(BENCH) -m benchmarks.run

docs: $(VENV)/.installed-docs  ## the documentation in build/site, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

tutorials: $(VENV)/.installed-docs  ## run the tutorials in full, so that `make docs` shows what they print and draw
	$(ONE_THREAD) $(RUN) -m docs.run_tutorials

clean:  ## remove the environments, outputs and caches
	rm -rf $(VENV) $(BENCH_VENV) $(OUT) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

# torch comes first and alone: pinned, so that what follows finds it in place and pulls no second, larger build.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %d.%d; set PYTHON=" % ((sys.executable,) + sys.version_info[:2]) or 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP_INSTALL) torch
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.torch pyproject.toml
	$(RUN) $(PIP_INSTALL) -e '.[data,plots]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml
	$(RUN) $(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml
	$(RUN) $(PIP_INSTALL) -e '.[data,docs,notebooks,plots]'
	@touch $@ $(VENV)/.installed-demo

$(BENCH_VENV)/.installed: constraints.txt pyproject.toml $(wildcard benchmarks/*.txt)
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH) $(PIP_INSTALL) torch
	$(BENCH) $(PIP_INSTALL) -c benchmarks/constraints.txt -e '.[data]' -r benchmarks/requirements.txt
	$(BENCH) $(PIP_INSTALL) --no-deps -r benchmarks/requirements-alone.txt
	@touch $@
