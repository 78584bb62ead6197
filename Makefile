# Two commands do all the set-up they need on a fresh machine: `make quickstart` and `make test`.
VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: quickstart test check docs unit gpu matrix family models faults experimental clean

quickstart: $(VENV)/.quickstart  ## LoRA-tune a real language model on real data; everything lands in runs/quickstart/
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.test  ## lint, types, the documentation and the whole suite, at the same time: the first two leave a core idle
	+$(MAKE) --jobs=3 check docs unit

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test  ## the documentation, in docs/_build/html; a warning, such as a broken link, is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build/html

unit: $(VENV)/.test  ## the suite, WORKERS files at a time, on the CPU wherever it runs
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder  # in the order of tests/conftest.py

gpu: $(VENV)/.test  ## what needs a GPU, or two
	$(BIN)/python -m pytest tests/test_gpu.py tests/test_gpu_memory.py tests/ops tests/tasks/test_packing_gpu.py
	$(BIN)/python -m pytest tests/distributed -k gpus

matrix: $(VENV)/.test  ## what works under which strategy, printed by running it
	$(BIN)/python -m tests.matrix

family: $(VENV)/.test  ## which variant and init work on which kind of layer, printed by running it
	$(BIN)/python -m tests.family && $(BIN)/python -m tests.family_inits

models: $(VENV)/.test  ## which architectures of transformers are adapted, merged, loaded in PEFT and exported right, printed by running it
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.models

faults: $(VENV)/.test  ## every row of the table of faults with its state, found by running its tests
	$(BIN)/python -m tests.faults

experimental: $(VENV)/.test  ## what depends on FSDP2's private names, alone; with TORCH=2.14.1 and a VENV of its own, on another torch
	$(if $(TORCH),$(BIN)/pip install --quiet torch==$(TORCH))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(wildcard tests/distributed/test_pull_frozen*.py)

# One virtual environment; a stamp for each set of extras, renewed when what it installs changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart $(VENV)/.test: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e ".[$*]"
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true  # on all cores, unlike pip; packages have templates that fail
	touch $@

clean:
	rm -rf $(VENV) runs docs/_build .pytest_cache .mypy_cache .ruff_cache
