# The two commands of the README (make demo, make test) and what they are made of. VENV and PYTHON may be given.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.fastmkd-ready
NATIVE := $(shell find csrc CMakeLists.txt setup.py -type f 2>/dev/null)

.PHONY: help install demo test test-all test-oldest lint types unit doctest bench gate sanitize clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      install into $(VENV), train on digits, print a table, draw a picture"
	@echo "make test      install into $(VENV), then lint, types and all tests (under 20 minutes on 2 cores)"
	@echo "make test-all  the same with the long tests"
	@echo "make test-oldest  the quick tests with the oldest versions of what fastmkd needs, in .venv-oldest"
	@echo "make bench     the headline benchmarks on this machine, then docs/benchmarks.md"
	@echo "make gate      whether a headline ratio has fallen (a part of make test)"
	@echo "make sanitize  the C++ tests with address, undefined-behaviour and thread sanitizers"
	@echo "make clean     remove build products (not $(VENV))"

install: $(READY)

# torch comes first and the build then uses it: with build isolation pip would download a second copy.
$(READY): pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $(VENV)/build-requires.txt
	$(BIN)/python -m pip install -r $(VENV)/build-requires.txt
	$(BIN)/python -m pip install --no-build-isolation -e ".[train,bench,test]"
	touch $@

demo: install
	$(BIN)/fastmkd demo

# mypy and the docstrings' examples keep one core busy each.
test: install lint
	$(MAKE) -j2 types doctest
	$(MAKE) unit

test-all: install lint types doctest
	$(BIN)/python -m pytest tests

# pip takes the oldest versions from the constraints. The libraries in the checkout are built anew, against the oldest
# PyTorch; they serve the newer ones too.
test-oldest:
	PIP_CONSTRAINT=$(CURDIR)/oldest.txt $(MAKE) VENV=.venv-oldest unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

doctest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --doctest-modules fastmkd -q

bench: install
	$(BIN)/fastmkd bench
	$(BIN)/python -m fastmkd.bench.report
	$(BIN)/python -m fastmkd.bench.headlines

gate: install
	$(BIN)/python -m fastmkd.bench.gate

# clang's or gcc's runtime finds races in the kernels' own threads; the operators of PyTorch are no part of it.
sanitize: install
	for kind in "address;undefined" thread; do \
	  folder=build/sanitize-$${kind%%;*}; \
	  $(BIN)/cmake -S . -B $$folder -G Ninja -DCMAKE_MAKE_PROGRAM="$$(realpath $(BIN)/ninja)" \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTMKD_SANITIZE="$$kind" || exit 1; \
	  $(BIN)/cmake --build $$folder $(if $(MAX_JOBS),--parallel $(MAX_JOBS)) || exit 1; \
	  $(BIN)/ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info fastmkd/lib fastmkd/_native*.so $(READY)
