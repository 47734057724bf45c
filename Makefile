# make demo   the whole job on real handwritten digits      make test   lint, types and all tests
# make check  lint, format and types only                   make bench  the benchmarks (minutes)
# make crash-test  kills 200 real runs and compares what they come to (an hour)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Two multi-threaded processes on one machine fight for cores; tests run one thread each.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
JOBS ?= 2

.PHONY: demo test check bench crash-test format clean

demo: $(VENV)/.demo
	$(BIN)/krdistill demo

test: check
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup
	$(TEST_ENV) PYTHONPATH=$(CURDIR)/$(VENV)/timm $(BIN)/python -m pytest -q tests/models/test_foreign.py

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test
	$(BIN)/python benchmarks/anchors.py --json benchmarks/results/anchors.json
	$(BIN)/python benchmarks/augment.py --json benchmarks/results/augment.json
	$(BIN)/python benchmarks/losses.py --json benchmarks/results/losses.json
	$(BIN)/python benchmarks/decode.py --json benchmarks/results/decode.json
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/step.py --json benchmarks/results/step.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(BIN)/python benchmarks/startup.py --json benchmarks/results/startup.json
	$(BIN)/python benchmarks/performance.py

crash-test: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python tests/crash/harness.py --kills 200 --json benchmarks/results/crash.json

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'krdistill needs Python 3.10 or later; set PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing (about a minute) ..."
	$(PIP) -e '.[train,onnx]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[train,onnx,test,examples]'
	@# torchvision beside a CPU build of torch breaks what imports it unprepared, so these two have a folder of their own
	$(PIP) --target $(VENV)/timm --upgrade --no-deps timm torchvision
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
