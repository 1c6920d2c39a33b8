# Two commands are all the set-up there is: `make test` and `make demo`. Each makes .venv first if it is absent.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2

.PHONY: test demo lint gpu-test bench clean

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

demo: $(READY)
	$(BIN)/python examples/ledger/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-test: $(READY)
	$(BIN)/python -m pytest -q -m gpu

bench: $(READY)
	$(BIN)/python benchmarks/run.py

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,plots]"
	touch $(READY)

# Of runs/ the demo's alone: your own may lie beside it.
clean:
	rm -rf .venv build runs/ledger *.egg-info .pytest_cache .mypy_cache .ruff_cache
