# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all check bench clean

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	@# torch first: anything that depends on it would take the registry's newest build, with gigabytes of CUDA.
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/steeple demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/pip install --quiet --editable ".[dev,triton,fuzz]"
	$(BIN)/python -m pytest -m "not gpu"
	$(BIN)/steeple verify --model demo --drafter ngram,small_lm,sparse_self,spire

check: $(READY)
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/steeple bench --model demo --drafters none,ngram,small_lm --batch 1,8,32 --context 128,1024 \
		--max-tokens 64 --temperature 0 --repeat 3 --dtype bfloat16 --identity-requests 4 \
		--json bench/results/demo-bfloat16.json --plots bench/results/plots-bfloat16

clean:
	rm -rf .venv build dist
