# A fresh machine needs Python 3.11 or newer, git and make. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test kernels lint docs soak bench clean

help:
	@echo "make quickstart   train and grow a small model on real text (three to four minutes on two cores)"
	@echo "make test         the test suite"
	@echo "make kernels      every check of the Triton kernels: in the interpreter, and compiled for each GPU (no GPU needed)"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make soak         kill training 100 times, resume, compare bitwise"
	@echo "make bench        throughput against a bare loop, quality against a nanoGPT-style peer (about half an hour)"
	@echo "make clean        remove the virtual environment, caches and build outputs; runs/ stays"

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
	$(BIN)/python -m pytest -m "not kernels" -n 2 --dist loadfile --no-loadscope-reorder

kernels: .venv/.installed
	$(BIN)/python -m pytest tests/kernels

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
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
