# `make demo` and `make test` each start from a bare checkout: they create .venv, install into it, and run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-slow lint install clean

demo: install  ## pretrain on the built-in images, evaluate, draw: about four minutes on two cores
	$(BIN)/python train.py --config configs/pretrain/shapes_resnet8.yaml --run_dir $(DEMO_RUN)
	$(BIN)/python linear_eval.py --checkpoint $(DEMO_RUN)
	$(BIN)/simclr report --run_dir $(DEMO_RUN)

test: install lint  ## the tests that need neither a GPU nor patience
	$(BIN)/python -m pytest

test-slow: install  ## the slow ones: minutes each on two cores
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
