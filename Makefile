# One virtual environment for each version of Python: make test PYTHON=python3.13
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
ifeq ($(VERSION),)
$(error PYTHON=$(PYTHON) does not run; name a Python of 3.11 or later, as in make test PYTHON=python3.13)
endif
VENV := .venv-$(VERSION)
READY := $(VENV)/.ready
PIP := $(VENV)/bin/python -m pip --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test grid experiments docs clean

help: ## What can be made
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16
	@echo "  PYTHON=...    the interpreter, now $(PYTHON) ($(VERSION)), environment $(VENV)"

setup: $(READY) ## Install jaxllm, both compilers for absent devices, and the test tools

# Again whenever the dependencies change
$(READY): pyproject.toml
	@echo "installing into $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@$(PIP) install --upgrade --editable '.[gpu-target,tpu-target,test]'
	@touch $@

demo: $(READY) ## Four checks: run on 8 emulated devices, then compiled for 8 H100, 8 TPU v5e and 16,384 H100
	$(VENV)/bin/jaxllm check llama-tiny --mesh cpu:8 --layout data=4,tensor=2,zero=3 --run
	$(VENV)/bin/jaxllm check llama-2-7b --mesh h100:8 --layout data=4,tensor=2,zero=3,remat=full --batch 8 --seq 4096
	$(VENV)/bin/jaxllm check llama-tiny --mesh v5e:2x4 --layout data=4,tensor=2,zero=1
	$(VENV)/bin/jaxllm check llama-3.1-405b --mesh h100:2048x8 --layout data=2048,tensor=8,zero=3,remat=full --batch 2048 --seq 8192

test: $(READY) ## The floors and all tests
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

grid: $(READY) ## Every layout of a small model on every target, and real models; resumable; writes docs/grid.md
	$(VENV)/bin/python -m tests.grid

experiments: $(READY) ## Run every experiment that needs no device again, into docs/measurements; two hours
	@for name in zero_stages zero_table three_compilers llama_405b why_zero2 activation_memory pipeline_schedules megatron_3d \
	    stage_imbalance sequence_lengths layer_imbalance offload training_days fit_a100 step_time_accuracy plan_regret training_run \
	    played calibrated_step optimizers curves crashes bench_step bench_pipeline bench_check bench_inspect bench_peak bench_plan; do \
	  echo "== $$name" && $(VENV)/bin/python experiments/$$name.py --out docs/measurements || exit 1; done

docs: $(READY) ## Run every command in README.md and docs/ again, and write what it prints
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m tests.docs.execute --write

clean: ## Remove the environments and what the tests leave
	rm -rf .venv-* .pytest_cache .hypothesis .import_linter_cache build dist
