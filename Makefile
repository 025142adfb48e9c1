# `make demo`, `make test` and `make test-oldest` each start from a bare checkout: they create a virtual environment
# (.venv; .venv-oldest), install into it, and run.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
# One process of tests for each core, of one thread; one that has done its share takes over from the others.
TEST := -m pytest --numprocesses auto --dist worksteal
BENCHMARKS := nt_xent augmentation gradient_cache training
DEMO_RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-oldest test-slow lint install docs clean bench bench-gpu

demo: install  ## pretrain on the built-in images, evaluate, draw: about three minutes on two CPU cores
	$(BIN)/python train.py --config configs/pretrain/shapes_resnet8.yaml --run_dir $(DEMO_RUN)
	$(BIN)/python linear_eval.py --checkpoint $(DEMO_RUN)
	$(BIN)/simclr report --run_dir $(DEMO_RUN)

test: install lint  ## the tests that need neither a GPU nor patience
	OMP_NUM_THREADS=1 $(BIN)/python $(TEST)

test-oldest: $(OLDEST)/installed  ## the same, with the lowest versions of what pyproject.toml asks for
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(TEST)

test-slow: install  ## the slow ones: minutes each on two cores
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[dev]' --constraint tests/oldest.txt
	touch $@

docs: install  ## guide and reference as pages in site/; a broken link is an error
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: install  ## every benchmark on the CPU, about an hour; tables in benchmarks/results
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]'
	for name in $(BENCHMARKS); do \
		$(BIN)/python benchmarks/$$name.py --markdown benchmarks/results/$${name}_cpu.md || exit 1; done
	$(BIN)/python benchmarks/decoding.py | tee benchmarks/results/decoding_cpu.md
	$(BIN)/python benchmarks/survival.py --markdown benchmarks/results/survival_cpu.md
	$(BIN)/python benchmarks/evaluation.py --markdown benchmarks/results/evaluation_cpu.md

bench-gpu: install  ## the tests that need a GPU, and every benchmark on it; CIFAR10=FOLDER (train/, test/) for the last
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]'
	$(BIN)/python -m pytest -m gpu
	for name in $(BENCHMARKS); do \
		$(BIN)/python benchmarks/$$name.py --device cuda --markdown benchmarks/results/$${name}_cuda.md || exit 1; done
	@test -n "$(CIFAR10)" || echo "time_to_accuracy.py is left out: it needs make bench-gpu CIFAR10=FOLDER"
	test -z "$(CIFAR10)" || $(BIN)/python benchmarks/time_to_accuracy.py --device cuda --images $(CIFAR10) \
		--markdown benchmarks/results/time_to_accuracy_cuda.md

clean:
	rm -rf $(VENV) $(OLDEST) site
