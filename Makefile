# Everything runs in .venv; PYTHON is only needed to create it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes among which the tests are dealt; each computes in one thread.
WORKERS ?= 2
ROOMS := flows tasks xai_core storage tests benchmarks

.PHONY: run test faults coverage lint format docs benchmarks clean

run: $(VENV)/.installed
	$(BIN)/vitrine run

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder

# The fault tests in full: minutes of killing, damaging and filling disks; `make test` has the short ones alone.
faults: $(VENV)/.installed-test
	VITRINE_FAULTS=full $(BIN)/python -m pytest tests/faults

# Every method on every kind of network, as the table in docs/methods.md says: some minutes.
coverage: $(VENV)/.installed-test
	VITRINE_COVERAGE=full $(BIN)/python -m pytest tests/xai_core/test_coverage.py

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check $(ROOMS)
	$(BIN)/ruff format --check $(ROOMS)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix $(ROOMS)
	$(BIN)/ruff format $(ROOMS)

# The generated tables of the docs: methods and metrics, and every method tried on every kind of network.
docs: $(VENV)/.installed-test
	$(BIN)/python -m flows.documentation docs/methods.md docs/metrics.md

benchmarks: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lint]"
	touch $@
