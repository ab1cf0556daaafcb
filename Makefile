# Everything a fresh Debian 12 with git, make and Python 3.11 needs is installed from here.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: run test test-compiled compiled lint bench crash fuzz soak paths golden lock clean packages
run: $(VENV)/.run                    ## serve the built-in demo on nbd://127.0.0.1:10809
	$(BIN)/nbdmap serve

test: $(VENV)/.dev packages          ## everything: unit, real clients, and Debian's kernel in QEMU
	tools/test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

compiled: $(VENV)/.dev               ## the data path as C extensions, by mypyc, into build/compiled (needs gcc and Python's headers)
	tools/compile

test-compiled: compiled              ## the tests of the compiled modules, on what was compiled
	$(PYTEST) -n 2 -o pythonpath="build/compiled ." tests/block tests/ciphers tests/control tests/dm tests/nbd tests/server tests/targets

bench: packages compiled             ## nbdmap beside nbdkit, qemu-nbd and nbd-server on the same file
	$(BIN)/python -m bench

crash: $(VENV)/.dev                  ## a million crash states of all scenarios, half a million more of thin, on both cores
	$(BIN)/python -m tests.crash.main run --states $(or $(STATES),1000000) --jobs 2
	$(BIN)/python -m tests.crash.main run --scenario thin --states $(or $(STATES),500000) --jobs 2 --seed 1000

fuzz: $(VENV)/.dev                   ## make fuzz SECONDS=600
	$(BIN)/python -m tests.fuzz $(or $(SECONDS),60)

soak: $(VENV)/.dev packages          ## make soak SECONDS=600: the server killed and restarted under verified load
	$(BIN)/python -m tests.soak $(or $(SECONDS),60)

paths: $(VENV)/.dev packages         ## make paths SECONDS=60: multipath whose servers are killed, for each selector
	$(BIN)/python -m tests.soak.paths $(or $(SECONDS),60)

golden: $(VENV)/.dev packages        ## record dmsetup's answers on Debian's kernels again
	$(BIN)/python -m tests.vm.transcripts

packages:                            ## the Debian packages of the tests (as root; others are told what is missing)
	tools/packages

$(VENV)/.run: requirements.lock pyproject.toml tools/venv
	tools/venv $(PYTHON) $(VENV) requirements.lock
	touch $@

$(VENV)/.dev: requirements-dev.lock pyproject.toml tools/venv
	tools/venv $(PYTHON) $(VENV) requirements-dev.lock
	touch $@ $(VENV)/.run

lock: $(VENV)/.dev                   ## renew the lock files from pyproject.toml
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml --group dev -o requirements-dev.lock

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
