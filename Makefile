# make demo   the whole job on real handwritten digits      make test   lint, types and all tests
# make check  lint, format and types only                   make bench  the benchmarks (minutes)
# make docs   the documentation as a site, in site/
# make crash-test  kills 200 real runs and compares what they come to (an hour)
# make fuzz   10,000 cases of odd input, others every time (minutes)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Two multi-threaded processes on one machine fight for cores; tests run one thread each.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
JOBS ?= 2

.PHONY: demo test check docs bench crash-test fuzz format clean

demo: $(VENV)/.demo
	$(BIN)/krdistill demo

test: check
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup
	$(TEST_ENV) PYTHONPATH=$(CURDIR)/$(VENV)/timm $(BIN)/python -m pytest -q tests/models/test_foreign.py \
		tests/deploy/test_sharing.py::test_a_timm_student

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.test
	$(BIN)/python benchmarks/anchors.py --json benchmarks/results/anchors.json
	$(BIN)/python benchmarks/augment.py --json benchmarks/results/augment.json
	$(BIN)/python benchmarks/losses.py --json benchmarks/results/losses.json
	$(BIN)/python benchmarks/decode.py --json benchmarks/results/decode.json
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/step.py --json benchmarks/results/step.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(BIN)/python benchmarks/refit.py --json benchmarks/results/refit.json
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/device.py --json benchmarks/results/device.json
	$(BIN)/python benchmarks/startup.py --json benchmarks/results/startup.json
	$(BIN)/python benchmarks/performance.py
	$(BIN)/python benchmarks/systems.py
	$(BIN)/python benchmarks/results.py

crash-test: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python tests/crash/harness.py --kills 200 --json benchmarks/results/crash.json

fuzz: $(VENV)/.test
	$(TEST_ENV) KRDISTILL_FUZZ_CASES=10000 KRDISTILL_FUZZ_JSON=benchmarks/results/fuzz.json \
		$(BIN)/python -m pytest -q -n $(JOBS) --timeout 3600 tests/fuzz

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'krdistill needs Python 3.10 or later; set PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing (about a minute) ..."
	$(PIP) -e '.[train,onnx]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[train,dlsa,onnx,hub,ray,test,examples,docs]'
	@# torchvision beside a CPU build of torch breaks what imports it unprepared, so these two have a folder of their own
	$(PIP) --target $(VENV)/timm --upgrade --no-deps timm torchvision
	@touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
