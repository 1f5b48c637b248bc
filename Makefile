# make demo | test | lint | format | bench | sanitize | picture | clean
# Each target first makes .venv, once: with CUDA where there is an NVIDIA GPU, without any of it elsewhere.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
CPU_INDEX := https://download.pytorch.org/whl/cpu

# The first Python of 3.10 or later that can make virtual environments; looked up only when it is needed.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& echo $$python && break; done)

# The kernels are built for the GPUs of this machine alone, and not at all where none could run them.
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| grep -E '^[0-9]+\.[0-9]+$$' | sed 's/\.//; s/^90$$/90a/' | sort -u | paste -sd ';')
NVCC := $(shell command -v nvcc || ls $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc 2>/dev/null)
ifeq ($(GPU_ARCHS),)
  FASTSPEC_CUDA ?= 0
else
  FASTSPEC_CUDA ?= auto
  FASTSPEC_CUDA_ARCHS ?= $(GPU_ARCHS)
  KERNEL_SOURCES := $(wildcard csrc/*)
endif
CPP_SOURCES := csrc/* tests/emulator/*
export FASTSPEC_CUDA FASTSPEC_CUDA_ARCHS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# tests/test_compile.py compiles the CUDA sources wherever nvcc is, GPU or not.
comma := ,
EXTRAS := test,lint$(if $(NVCC),$(comma)build)

.PHONY: demo test lint format bench sanitize picture install clean

demo: $(INSTALLED)
	$(BIN)/fastspec demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(INSTALLED)
	@failed=0; \
	for check in "ruff check ." "ruff format --check ." "clang-format --dry-run -Werror $(CPP_SOURCES)"; do \
		echo "$$check"; $(BIN)/$$check || failed=1; \
	done; exit $$failed

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt 'matplotlib>=3.8'
	$(BIN)/python -m bench $(or $(ARGS),all)

sanitize: $(INSTALLED)
	$(BIN)/python tests/sanitizer.py $(ARGS)

# The README's picture of the demo.
picture: $(INSTALLED)
	$(BIN)/python docs/demo_picture.py

install: $(INSTALLED)

# Editable, so that tests, tools and `import fastspec` in this folder all see the same files, compiled module included.
# A plain torch brings CUDA along; without a GPU PyTorch's own CPU builds are asked first, if they can be reached.
$(INSTALLED): pyproject.toml setup.py CMakeLists.txt constraints.txt $(KERNEL_SOURCES)
	@test -n "$(PYTHON)" || { echo "fastspec needs Python 3.10 or later with venv (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@index=""; \
	if [ -z "$(GPU_ARCHS)" ] && $(BIN)/python -c "import urllib.request as r; r.urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_INDEX)"; fi; \
	echo "installing torch$${index:+ from $(CPU_INDEX)}"; \
	$(BIN)/python -m pip install -q -c constraints.txt $$index torch
	@echo "installing fastspec and its tools"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@$(BIN)/fastspec info
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache fastspec/build.json fastspec/_C*.so
	find bench fastspec kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
