# On a fresh machine `make demo` or `make test` is all it takes: the environment is made, filled and kept up to date
# by the rule for $(STAMP).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS ?= constraints.txt
MINUTES ?= 60
STEPS ?= 10000
FAST := -m "not slow and not long" -q
BEHIND := tests/nn tests/ops tests/gates tests/testing tests/integrations tests/distributed

.PHONY: help install demo test verify emulate bench gpu examples plots docs lint format fuzz sanitize soak clean \
	test-fast test-long test-latest test-floor test-no-extension test-no-triton packaging sdist wheels

help:
	@echo "make demo     train, prune, compact and report on real data (a minute or two)"
	@echo "make test     every test that runs on this machine; the kernels in Triton's interpreter first"
	@echo "make verify   every op and backend here against the float64 reference"
	@echo "make emulate  compiled kernels against float64 on emulated GPUs (hours; goes on where it stopped)"
	@echo "make bench    the benchmark suite on this machine     make gpu   the same and the tests of a GPU"
	@echo "make examples one script for each published experiment"
	@echo "make plots    the charts and tables of the documentation, from the results files"
	@echo "make docs     the documentation as a site, in build/site"
	@echo "make fuzz     random and hostile calls of everything public, an hour; MINUTES=5 in CI"
	@echo "make sanitize the extension under AddressSanitizer and UBSan, on every instruction set (or ISA=avx2)"
	@echo "make soak     a plan of 10,000 steps, killed and resumed, against one that is not; STEPS=2000 in CI"
	@echo "make test-long   what takes minutes: four processes, killed runs, every pair (make test leaves it out)"
	@echo "make test-latest, test-floor   the fast tests with the newest and the oldest torch"
	@echo "make test-no-extension, test-no-triton   the fast tests with parts missing"
	@echo "make packaging sdist, wheel and installations of their own      make sdist, wheels   what is published"
	@echo "make lint     ruff, clang-format, mypy, import-linter    make format   formatters"
	@echo "make install  only the environment           make clean    remove what was built; the environment stays"

install: $(STAMP)

# Reinstalls when a version, the build or the C++ sources change; Python sources are read in place.
# torch comes first, alone, so that it is the pinned one that everything else is resolved against. The build is
# isolated and never sees torch.
$(STAMP): constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) torch
	$(PIP) install -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/dampr demo

# Two processes for two cores, each about half of the work: Triton's interpreter, the emulator of compiled kernels and
# then $(BEHIND) in one, all other tests in the other; what those print comes after the summaries of these.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BEHIND:%=--ignore=%) > $(VENV)/.test.log 2>&1 & others=$$!; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interpreter; interpreter=$$?; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/emulator $(BEHIND); emulator=$$?; \
	wait $$others; others=$$?; cat $(VENV)/.test.log; exit $$((interpreter | emulator | others))

# In slices: python -m tests.emulator --seconds 500
emulate: $(STAMP)
	$(BIN)/python -m tests.emulator

verify: $(STAMP)
	$(BIN)/dampr verify

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu: $(STAMP)
	bash benchmarks/gpu.sh

examples: $(STAMP)
	for script in examples/[a-z]*_*.py; do $(BIN)/python -m examples.$$(basename $$script .py) || exit 1; done

plots: $(STAMP)
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.tables

docs: $(STAMP)
	$(BIN)/mkdocs build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp
	$(BIN)/mypy
	$(BIN)/lint-imports

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/interpreter

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)

# Environments of their own, which stay for the next time.
test-latest:
	$(MAKE) test-fast VENV=.venv-latest CONSTRAINTS=/dev/null

test-floor:
	$(MAKE) test-fast VENV=.venv-floor CONSTRAINTS=constraints-floor.txt

test-no-extension: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.without dampr._C $(FAST) --ignore=tests/csrc

test-no-triton: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.without triton $(FAST) --ignore=tests/kernels \
		--ignore=tests/testing/test_codegen.py

packaging: $(STAMP)
	$(BIN)/python -m pytest tests/test_packaging.py

sdist: $(STAMP)
	$(BIN)/python -m build --sdist

# In the containers and environments of cibuildwheel, which pyproject.toml describes; on Linux it wants Docker.
wheels: $(STAMP)
	$(PIP) install cibuildwheel
	$(BIN)/python -m cibuildwheel --output-dir wheelhouse

soak: $(STAMP)
	$(BIN)/python -m tests.soak --steps $(STEPS)

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES)

sanitize: $(STAMP)
	$(BIN)/python -m tests.sanitize $(ISA:%=--isa %)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

clean:
	rm -rf build dist *.egg-info dampr/_C*.so $(STAMP) .benchmarks
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find dampr tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
