# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install quickstart test check check-static format test-gpu chaos clean

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing torch first (pinned), then the rest: about 4 minutes and 2 GB"
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	touch $@

install: $(INSTALLED)

quickstart: $(INSTALLED)
	@$(BIN)/zeroray run experiment=quickstart

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu"

check: check-static
	$(BIN)/python -m pytest -m unit

check-static: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-gpu: $(INSTALLED)
	$(BIN)/python tests/gpu_verdict.py

chaos: $(INSTALLED)
	$(BIN)/python tests/chaos.py --kills $(or $(KILLS),20) --seed $(or $(SEED),1)

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
