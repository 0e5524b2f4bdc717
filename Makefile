# Two commands: `make demo` and `make test`. Each does all set-up the first time it is run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LABELS := dog face,cat face,pizza,rocket,automobile,red apple,soccer ball,airplane,bicycle,house,guitar,umbrella

.PHONY: help setup demo test lint types format benchmark benchmark-scaling clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(READY)  ## Make the virtual environment.

$(READY): pyproject.toml .ci/dev-constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint .ci/dev-constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Classify the sample images with the embedded model.
	@mkdir -p build
	$(BIN)/bayesvlm classify hf_bayesvlm/assets/samples --labels "$(LABELS)" --top-k 3 --plot build/demo.png

test: $(READY)  ## Run the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)  ## Check style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## Check types.
	$(BIN)/mypy

format: $(READY)  ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(READY)  ## Print the speed ratios.
	$(BIN)/python scripts/benchmark.py --json build/benchmark.json

benchmark-scaling: $(READY)  ## Measure how the cost of estimation grows (about half an hour).
	$(BIN)/python scripts/benchmark_scaling.py --json build/scaling.json --write model_cards/scaling.md

clean:  ## Remove everything that was built.
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
