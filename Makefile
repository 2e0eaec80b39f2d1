# A fresh machine needs Python 3.11 or newer, git and make. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test kernels compat gpu lint docs soak bench clean

help:
	@echo "make quickstart   train and grow a small model on real text (three to four minutes on two cores)"
	@echo "make test         the test suite"
	@echo "make kernels      every check of the Triton kernels: in the interpreter, and compiled for each GPU (no GPU needed)"
	@echo "make compat       the kernels' tests with the oldest torch and triton that growkit allows, in an environment of their own"
	@echo "make gpu          on a machine with a GPU: are its kernels right, how fast are they (GPU='--only checks' for a part)"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make soak         kill training 100 times, resume, compare bitwise"
	@echo "make bench        throughput against a bare loop, quality against a nanoGPT-style peer (about half an hour)"
	@echo "make clean        remove the virtual environments, caches and build outputs; runs/ stays"

# The stamp comes last, so that an interrupted installation is taken up again. Tools are started through the
# environment's own python: a copied environment's scripts would call, and install into, the one it was copied from.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "growkit needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
			"Install one and name it: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: .venv/.installed
	$(BIN)/growkit train recipes/quickstart.yaml

test: .venv/.installed
	$(BIN)/python -m pytest -m "not kernels" -n 3 --dist loadfile --no-loadscope-reorder

kernels: .venv/.installed
	$(BIN)/python -m pytest tests/kernels

# The oldest pair that pyproject.toml allows. The interpreter of that triton converts arrays in a way that NumPy 2.4 took
# away; all else is as everywhere. Where the package index has no CPU build of that torch, it brings several gigabytes of
# CUDA libraries, which make clean removes.
.venv-compat/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-compat
	grep -vE '^(numpy|torch|triton)==' constraints.txt >.venv-compat/constraints.txt
	.venv-compat/bin/python -m pip install -c .venv-compat/constraints.txt \
		torch==2.11.0 triton==3.6.0 'numpy<2.4' hypothesis pytest pytest-timeout -e .
	@touch $@

compat: .venv-compat/.installed
	.venv-compat/bin/python -m pytest -m "not kernels" tests/kernels tests/test_pattention.py tests/test_selective_scan.py

gpu: .venv/.installed
	$(BIN)/python scripts/bench_gpu.py $(GPU)

lint: .venv/.installed
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check . && $(BIN)/python -m mypy

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html"

soak: .venv/.installed
	$(BIN)/python scripts/soak.py

bench: .venv/.installed
	$(BIN)/python scripts/bench_overhead.py
	$(BIN)/python scripts/bench_nanogpt.py

clean:
	rm -rf .venv .venv-compat build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
