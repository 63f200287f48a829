# Two commands do everything: `make serve` and `make test`. Both set up .venv when it is missing or out of date.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
ARGS   ?=

NATIVE    := $(wildcard herd/ops/native/*.cpp herd/ops/native/*.h herd/ops/native/*.inl)
SANITIZED := build/sanitize/kernels.so

.PHONY: serve test check format sanitize soak fuzz clean

serve: $(VENV)/serve.stamp
	@$(BIN)/herd pull cria >/dev/null
	@$(BIN)/herd serve $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the native tests on a library that stops at the first wrong address or undefined operation
sanitize: $(SANITIZED) $(VENV)/test.stamp
	LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	HERD_NATIVE_LIBRARY=$(abspath $<) $(BIN)/python -m pytest -p no:cacheprovider \
	tests/ops/test_interface.py tests/ops/test_native.py tests/ops/test_sample.py tests/engine/test_whole.py tests/engine/test_mapped.py -k "not cheap" $(ARGS)

$(SANITIZED): $(NATIVE)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -pthread -shared -fPIC -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -o $@ herd/ops/native/native.cpp

# an hour of random traffic over HTTP and from Python: nothing may leak, replies stay what they are. The C allocator is told to keep little
# for itself: with an arena and a cache for each thread, resident memory says more of those than of what is in use
soak: $(VENV)/test.stamp
	SOAK_S=$(or $(SOAK_S),3600) OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 GLIBC_TUNABLES=glibc.malloc.tcache_count=0 $(BIN)/python -m pytest -s tests/engine/test_soak.py $(ARGS)

fuzz: $(VENV)/test.stamp
	FUZZ_N=$(or $(FUZZ_N),100000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/serve/test_fuzz.py $(ARGS)

clean:
	rm -rf $(VENV) build/sanitize

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("herd needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.stamp: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/serve.stamp
