# make demo: install, compare, report.  make test: install, every check.  See CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2

.PHONY: demo install install-dev test fast lint types layers laws peers bench build clean
.DEFAULT_GOAL := test

# --- install: a stamp per level, so that a second `make` starts at once --------------------------------------------------------

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Trilemma needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that no dependency can pull another build of it
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing (torch first; minutes on the first run)"
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed tests/oracles.txt
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps -r tests/oracles.txt
	@touch $@

# --- the main job on generated data --------------------------------------------------------------------------------------------

demo: install
	$(BIN)/trilemma compare recipes/demo.yaml --out demo
	@echo
	@$(BIN)/python examples/use_the_winner.py demo

# --- checks --------------------------------------------------------------------------------------------------------------------

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy --strict src

layers: install-dev
	$(BIN)/lint-imports

test: lint types layers
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

fast: install-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	TRILEMMA_LAWS=fast $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not laws"

laws: install-dev
	TRILEMMA_LAWS=full $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "laws or turns"

peers: install
	$(PIP) install -c constraints.txt -e '.[peers]'
	$(PIP) install --no-deps -c constraints.txt -r benchmarks/peers.txt

# every benchmark, hours on two cores; BENCH="--tiny" or BENCH="--only train_step_lm" for less
bench: peers
	$(BIN)/python -m benchmarks $(BENCH)

build: install-dev
	$(PIP) wheel --no-deps -w dist .

clean:
	rm -rf demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
