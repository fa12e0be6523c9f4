# Every target does its own set-up: on a machine that has python3 (3.10 or newer, with venv and pip), g++ and make,
# `make demo` and `make test` need nothing run before. The second run finds it done.
#
#   make demo      train two small networks with and without fastreg, and compare
#   make test      every test on every backend
#   make bench     the benchmark table of this machine, into bench/results/
#   make native    build the native libraries into fastreg/lib
#   make wheel     build a wheel with the native libraries into dist/
#   make gpu       on a machine with a GPU: build, test, sanitize and time the real kernels; installs nothing
#   make lint      ruff and mypy
#   make clean     remove what was built (.venv stays)
#
# Variables: PYTHON (makes the virtual environment), VENV (where it lies), CUDA_ARCHITECTURES (such as "80;90"), JOBS,
# COMPLETE (yes: `make test` leaves out nothing of what the README lists).
# `make gpu` also takes STAGE (tests, sanitize, bench, bench_batch_norm, bench_group_norm or bench_dropout; all if not
# given), OUT (where results go), LIMIT (seconds a stage), DEVICE=cpu (a rehearsal without a GPU), TESTS and BACKENDS
# (instead of all), PROCESSES (at a time), SANITIZER (its path), BUILD=no, COMMIT (where there is no git), WORK (instead
# of build/gpu).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# The architecture of this machine's GPU. Without one nothing runs the kernels, but all four must compile without spills.
# A complete run compares the kernels of all four.
GPU_ARCHITECTURE := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | grep -E '^[0-9]+\.[0-9]+$$' | head -1 | tr -d .)
CUDA_ARCHITECTURES ?= $(or $(if $(COMPLETE),,$(GPU_ARCHITECTURE)),80;90;100;120)

BIN := $(VENV)/bin
CMAKE := $(BIN)/cmake
# Python compiles what it imports, a fraction of what is installed.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile
# What it compiled is kept: the tests start many processes, and each would need four seconds more to import torch.
unexport PYTHONDONTWRITEBYTECODE
# NVIDIA's compiler from PyPI, where there is none.
NVCC := $(if $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null),,$(VENV)/nvcc.txt)

BACKENDS := reference triton native cuda_sim
# What `make test` runs, the longest first: the short ones at the end leave neither of the two waiting for the other.
TESTED := reference triton native cuda_sim oldest_triton oldest_triton_compiled
OLDEST_TRITON := $(shell sed -n 's/^triton==//p' requirements/oldest_triton.txt)

.DELETE_ON_ERROR:
.PHONY: demo test bench gpu native native-cpu native-cuda wheel lint clean $(TESTED:%=test-%)

# --- set-up ----------------------------------------------------------------------------------------------------------

# The stamp is as old as the installation: a changed requirements file installs again, a second run does not.
$(VENV)/installed.txt: requirements/development.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastreg needs Python 3.10 or newer, but $(PYTHON) is " \
	  + sys.version.split()[0] + ": make PYTHON=/path/to/python3.10")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual" \
	  "environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing $< into $(VENV) (torch is large: this takes a few minutes, once)"
	@$(INSTALL) -r $<
	@cp $< $@

$(VENV)/nvcc.txt: requirements/nvcc.txt $(VENV)/installed.txt
	@echo "no nvcc on this machine: installing $< into $(VENV)"
	@$(INSTALL) -r $<
	@cp $< $@

# The oldest Triton that fastreg supports, which goes before the installed one on the search path of its own tests.
$(VENV)/oldest_triton.txt: requirements/oldest_triton.txt $(VENV)/installed.txt
	@echo "installing $< into $(VENV)/oldest_triton"
	@rm -rf $(VENV)/oldest_triton
	@$(INSTALL) --quiet --no-deps --target $(VENV)/oldest_triton -r $<
	@cp $< $@

# --- native libraries ------------------------------------------------------------------------------------------------

CONFIGURE = $(CMAKE) -S . -B build -G Ninja -DPython_EXECUTABLE="$(abspath $(BIN)/python)" \
  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)" -DFASTREG_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" --log-level=WARNING

native: native-cuda

native-cpu: $(VENV)/installed.txt
	@$(CONFIGURE) -DFASTREG_CUDA=AUTO
	@$(CMAKE) --build build --parallel $(JOBS) --target fastreg_cpu

native-cuda: $(VENV)/installed.txt $(NVCC)
	@$(CONFIGURE) -DFASTREG_CUDA=ON
	@$(CMAKE) --build build --parallel $(JOBS)

# --- what one does with it -------------------------------------------------------------------------------------------

# Without a GPU the demo and the benchmarks run no CUDA kernel, and need not wait for nvcc.
USABLE := $(if $(GPU_ARCHITECTURE),native-cuda,native-cpu)

demo: $(USABLE)
	$(BIN)/python -m fastreg demo

bench: $(USABLE)
	$(BIN)/python -m bench

# One run for each backend, the longest first, two at a time; what does not depend on a backend is tested with the
# reference. A part's output is shown when it ends, and all parts run even if one fails.
# PASSIVE: torch's idle threads would spin, on the processor that the other part needs, for a third of the time.
TEST = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(if $(COMPLETE),--complete)
test: native-cuda $(VENV)/oldest_triton.txt
	@echo "testing the backends $(BACKENDS), and Triton $(OLDEST_TRITON): some minutes; the output of each follows when" \
	  "it is done"
	@$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target $(TESTED:%=test-%)

$(BACKENDS:%=test-%): test-%: native-cuda
	$(TEST) tests --backend $* --durations 5 --junit-xml build/tests/$*.xml
	@$(BIN)/python .ci/check_report.py $* build/tests/$*.xml

# Triton's kernels once more, interpreted and compiled by the oldest Triton: of the op suites, since what lies above the
# kernels knows no version of Triton, every twelfth test, and all of them in a complete run. Either has to run every kernel.
# --triton: by that one and no other.
OP_SUITES := $(shell grep -lE '^class Test\w+\(\w+Suite\)' tests/test_*.py) \
  tests/test_conformance.py tests/test_dropout.py tests/test_drop_block.py
WITH_OLDEST_TRITON = PYTHONPATH=$(abspath $(VENV)/oldest_triton) $(TEST) --triton $(OLDEST_TRITON)

test-oldest_triton: native-cuda $(VENV)/oldest_triton.txt
	$(WITH_OLDEST_TRITON) $(OP_SUITES) --backend triton $(if $(COMPLETE),,--shard 2/12) --every-kernel \
	  --junit-xml build/tests/$@.xml
	@$(BIN)/python .ci/check_report.py triton-oldest build/tests/$@.xml

test-oldest_triton_compiled: native-cuda $(VENV)/oldest_triton.txt
	$(WITH_OLDEST_TRITON) tests/test_triton*_compile.py tests/test_triton*_launch.py \
	  $(if $(COMPLETE),,--shard 1/2) --junit-xml build/tests/$@.xml
	@$(BIN)/python .ci/check_report.py triton-oldest-compiled build/tests/$@.xml

# The machine's own Python, torch, nvcc, cmake and ninja; no virtual environment, no network. bench/gpu says what it does.
gpu: export FASTREG_COMMIT := $(COMMIT)
gpu: export FASTREG_GPU_WORK := $(WORK)
gpu:
	@$(PYTHON) -m bench.gpu --stage "$(STAGE)" --device "$(DEVICE)" --out "$(OUT)" --limit "$(LIMIT)" --tests "$(TESTS)" \
	  --backends "$(if $(filter command,$(origin BACKENDS)),$(BACKENDS))" --jobs "$(PROCESSES)" \
	  --sanitizer "$(SANITIZER)" $(if $(filter no,$(BUILD)),--no-build)

wheel: $(VENV)/installed.txt $(NVCC)
	FASTREG_NATIVE=1 FASTREG_CUDA=1 $(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir dist .

lint: $(VENV)/installed.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist fastreg/lib
