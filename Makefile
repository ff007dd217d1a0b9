# make demo, make test: each does all its set-up in .venv first, and repeats quickly.
#   make PYTHON=python3.12 test      another Python
#   make TORCH_INDEX=URL test        an index to take torch from, such as PyTorch's own for CPUs
#   make ARGS=--quick bench          arguments for each benchmark: attention, decoder, block, whole model
# With a C++ compiler the native kernels are built, with nvcc the CUDA ones: setup.py has the switches.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
TORCH_INDEX ?=
TORCH := torch==2.13.0
TRITON := triton==3.6.0
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
READY := $(VENV)/ready
# Some interpreted work is fastest on one BLAS thread; C++ and PyTorch use all cores unless told otherwise. Their
# threads sleep while they wait: beside other work on the same cores, tests whose threads spin take five times as long,
# and a frame upscaled beside two busy loops took 4 and 18 times as long.
TEST_ENV := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(nproc)} OMP_WAIT_POLICY=passive

COMPILED := tests/test_aot.py

.PHONY: demo test bench check clean
demo: $(READY)
	OMP_WAIT_POLICY=passive $(RUN) -m flashvsr_model demo

# What interprets kernels and then what compiles them ahead of time have a process group of their own beside the other
# tests: each keeps to one core mostly.
test: $(VENV)/triton
ifdef ARGS
	$(TEST_ENV) $(RUN) -m pytest $(ARGS)
else
	set -m; { failed=0; \
	  $(TEST_ENV) TRITON_INTERPRET=1 $(RUN) -m pytest -m interpret || failed=1; \
	  $(TEST_ENV) $(RUN) -m pytest $(COMPILED) || failed=1; \
	  exit $$failed; } >$(VENV)/beside.log 2>&1 & beside=$$!; set +m; \
	  trap "kill -- -$$beside 2>/dev/null || true" EXIT; failed=0; \
	  $(TEST_ENV) $(RUN) -m pytest $(COMPILED:%=--ignore=%) || failed=1; \
	  wait $$beside || failed=1; cat $(VENV)/beside.log; exit $$failed
endif

bench: $(VENV)/triton
	$(RUN) -m benchmarks.bench_attention $(ARGS)
	$(RUN) -m benchmarks.bench_decoder $(ARGS)
	$(RUN) -m benchmarks.bench_block $(ARGS)
	$(RUN) -m benchmarks.bench_upscaler $(ARGS)

check: $(VENV)/triton
	$(TEST_ENV) $(RUN) -m benchmarks.check $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info flashvsr_kernels/*.so

# torch: kept if .venv has it. A Python that has torch>=2.11 lends all that is installed beside it to .venv
# (by a .pth file, as that Python may be a virtual environment itself): a GPU machine without a package index
# needs none.
# A new .venv's own, old setuptools would hide the lent one.
# Otherwise the newest torch where there is an NVIDIA GPU, else the CPU build if the index has one, else the
# full.
$(READY): pyproject.toml setup.py $(shell find csrc -type f)
	@if ! test -x $(RUN); then \
	  echo "flashvsr: making $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); \
	  $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11); \
	    print(torch.__file__.rsplit("/", 2)[0])' >$(VENV)/lent 2>/dev/null \
	    && $(PIP) uninstall -q -y setuptools 2>/dev/null \
	    && mv $(VENV)/lent $$(echo $(VENV)/lib/python3*/site-packages)/lent.pth || rm -f $(VENV)/lent; \
	fi
	@index="$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))"; \
	if $(RUN) -c 'import torch' 2>/dev/null; then echo "flashvsr: torch is here"; \
	elif nvidia-smi >/dev/null 2>&1; then $(PIP) install -q $$index torch; \
	elif $(PIP) install -q $$index "$(TORCH)+cpu" 2>/dev/null; then echo "flashvsr: torch for CPUs installed"; \
	else echo "flashvsr: the index has no CPU build of torch; installing $(TORCH), maybe several GB"; \
	  $(PIP) install -q $$index "$(TORCH)"; fi
	@$(RUN) -c 'import setuptools; assert int(setuptools.__version__.split(".")[0]) >= 77' 2>/dev/null \
	  || $(PIP) install -q 'setuptools>=77,<82'
	@$(RUN) -c 'import ninja' 2>/dev/null || $(PIP) install -q ninja || echo "flashvsr: building without ninja"
	@if ! $(PIP) install -v --no-build-isolation -e '.[test]' >$(VENV)/install.log 2>&1; then \
	  grep -qE 'No matching distribution|Could not find a version' $(VENV)/install.log \
	    || { tail -30 $(VENV)/install.log; exit 1; }; \
	  echo "flashvsr: some packages cannot be had from the index; installing without them:"; \
	  $(PIP) install -v --no-build-isolation --no-deps -e . >$(VENV)/install.log 2>&1 \
	    || { tail -30 $(VENV)/install.log; exit 1; }; \
	  $(PIP) check || true; \
	fi
	@grep -E '^ *flashvsr [0-9]' $(VENV)/install.log | tail -1
	@touch $@

# Without a GPU Triton's kernels are still compiled, for every architecture, and interpreted. A CUDA build of torch
# brings its own Triton; the CPU build has none and gets the version that was measured on a GPU.
$(VENV)/triton: $(READY)
	@$(RUN) -c 'import triton' 2>/dev/null || $(PIP) install -q $(TRITON) \
	  || echo "flashvsr: the index has no $(TRITON) for this machine: its tests are skipped"
	@touch $@
