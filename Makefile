# Every target sets up what it needs; `make test` and `make demo` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA_VENV := .venv-cuda
SOURCES := setup.py pyproject.toml $(shell find csrc -path csrc/cuda -prune -o \( -name '*.cpp' -o -name '*.h' \) -print)

.PHONY: demo test test-quick lint format bench sanitize aot audit rehearsal docs wheel clean

# Two processes, because most tests are one thread of Python; waiting threads sleep, because two times two are too many.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist worksteal

test: $(VENV)/test
	$(PYTEST)

test-quick: $(VENV)/test
	$(PYTEST) -m "not slow"

demo: $(VENV)/demo
	$(BIN)/python examples/minilm_demo.py

bench: $(VENV)/bench
	$(BIN)/fastattn bench

CXX_FILES = $$(git ls-files '*.h' '*.cpp' '*.cuh')
lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The C++ under the sanitizers for memory, undefined behaviour and threads; SANITIZE_TESTS=tests runs everything.
SANITIZE_TESTS ?= tests/test_native_memory.py
sanitize: $(VENV)/test
	$(BIN)/python tests/sanitize.py $(SANITIZE_TESTS)
	$(BIN)/python tests/sanitize.py --thread $(SANITIZE_TESTS)

# Every Triton kernel, tuning row and option, compiled for sm_80, sm_90 and sm_100 (a sample of it is in `make test`).
aot: $(VENV)/test
	$(BIN)/python tests/triton_aot.py --all --quiet

# Every CUDA C++ kernel, compiled for sm_80, sm_90a, sm_100 and sm_120. Ten minutes or more from nothing, then only what has
# changed; it may be stopped and goes on where it was. Commit tests/audited.json: `make test` compiles a sample and holds
# the rest to it.
audit: $(VENV)/test
	$(BIN)/python tests/cuda_audit.py --all --quiet

# What a GPU would be asked to do (benchmarks/gpu_queue.sh), on torch's CUDA build and GPUs that are the memory of the host:
# tests/cuda_rehearsal/README.md. Downloads 3 GB the first time.
PARTS ?= test verify
rehearsal: $(CUDA_VENV)/ready
	PYTHONPATH=tests $(CUDA_VENV)/bin/python -m cuda_rehearsal $(CUDA_VENV)/rehearsal
	FASTATTN_REHEARSAL=$(CUDA_VENV)/rehearsal PYTHONPATH=tests/cuda_rehearsal/site:tests LIMIT=7200 \
	  PYTHON=$(CUDA_VENV)/bin/python benchmarks/gpu_queue.sh "$(PARTS)" $(CUDA_VENV)/out

docs: $(VENV)/test
	$(BIN)/fastattn doctor --matrix > docs/support-matrix.md
	$(BIN)/fastattn hf-table > docs/hf-models.md

wheel: $(VENV)/lint
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info fastattn/_native*.so

# ---- the virtual environment: a stamp per set of extras, exact versions from constraints.txt
$(VENV)/base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy setuptools pybind11
	touch $@

$(VENV)/native: $(VENV)/base $(SOURCES)
	FASTATTN_REQUIRE_NATIVE=1 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/test: $(VENV)/native
	$(BIN)/pip install -q -c constraints.txt 'fastattn[test]'  # the extra's packages; fastattn itself stays as built
	touch $@

$(VENV)/bench: $(VENV)/native
	$(BIN)/pip install -q -c constraints.txt 'fastattn[bench]'  # the extra's packages; fastattn itself stays as built
	touch $@

$(VENV)/demo: $(VENV)/native
	$(BIN)/pip install -q -c constraints.txt 'fastattn[demo]'  # the extra's packages; fastattn itself stays as built
	touch $@

$(VENV)/lint: $(VENV)/native
	$(BIN)/pip install -q -c constraints.txt 'fastattn[dev]'  # the extra's packages; fastattn itself stays as built
	touch $@

# Versions as on the GPUs that fastattn is measured on; no wheel of it is built here, its module is that of $(VENV).
$(CUDA_VENV)/ready: $(VENV)/native tests/cuda_rehearsal/requirements.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install -q -r tests/cuda_rehearsal/requirements.txt
	touch $@
