# Every target sets up what it needs in .venv; PYTHON names the interpreter to make it with (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml kernels/cpu/CMakeLists.txt $(wildcard kernels/cpu/csrc/*)

.PHONY: serve test check nightly bench clean

serve: $(VENV)/.installed
	$(BIN)/sirocco $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

nightly: $(VENV)/.installed-dev
	$(BIN)/pytest --hypothesis-profile search -m "nightly or hypothesis" $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/overhead.py $(ARGS)

# torch by exact version first: a range may bring several gigabytes of CUDA packages.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --group dev
	touch $@

clean:
	rm -rf $(VENV) build kernels/cpu/_native*.so
