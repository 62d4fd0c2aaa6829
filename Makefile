PYTHON ?= python3
ACCEL ?= cpu
ARGS ?=

BIN := .venv/bin
PY := $(BIN)/python
TYPESCRIPT := clients/typescript

export ACCEL
.DEFAULT_GOAL := help
.PHONY: help install freeze demo serve proto proto-check proto-image reference format lint check \
        test test-python test-typescript test-slow bench chaos wheel demo-model clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo
	@echo "  Variables: PYTHON=python3.12  ACCEL=cpu|cuda|vulkan|metal|rocm  ARGS='...' (serve, bench)"

install:  ## make .venv with everything; builds llama.cpp once, instant when up to date
	@$(PYTHON) -m tools.install --accel $(ACCEL)

demo: install  ## start a server with the embedded model and talk to it
	@$(PY) -m bear_grpc.demo

serve: install  ## run the server: make serve ARGS="--listen 127.0.0.1:50051"
	@$(BIN)/bear serve $(ARGS)

proto: install  ## regenerate bear_grpc/v1 from protos/
	@$(PY) -m tools.protos

proto-check: install  ## compare bear_grpc/v1 and the committed baseline with protos/
	@$(PY) -m tools.protos --check
	@$(PY) -m tools.protos --breaking

reference: install  ## write docs/configuration.md from the types of the settings
	@$(PY) -m tools.configuration

proto-image: install  ## make today's API the baseline of the breaking check (at a release)
	@$(PY) -m tools.protos --image

format: install  ## format the code and apply the safe fixes
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

lint: install  ## read only: ruff, mypy --strict, buf lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(PY) -m tools.protos --lint

check: lint proto-check  ## all that can be checked without running the code

test: test-python test-typescript  ## the fast tests: Python, then the TypeScript client where node is there

test-python: install
	@$(PY) -m pytest -m "not slow" $(ARGS)

test-typescript: install
	@if [ ! -f $(TYPESCRIPT)/package.json ]; then echo "TypeScript client: not here"; \
	elif ! command -v npm >/dev/null; then echo "TypeScript client: NOT TESTED, node and npm are missing"; \
	else cd $(TYPESCRIPT) && { [ node_modules/.package-lock.json -nt package-lock.json ] || \
	  npm ci --no-audit --no-fund --loglevel=error; } && npm run -s generate:check && npm test; fi

test-slow: install  ## the slow tests: installation from the wheel, many processes, long runs
	@$(PY) -m pytest -m slow $(ARGS)

bench: install  ## measure: make bench ARGS="--help"
	@$(PY) -m benchmarks $(ARGS)

chaos: install  ## faults at full size: make chaos ARGS="--help"
	@$(PY) -m tests.chaos $(ARGS)

wheel: install  ## build the project's wheel into dist/
	@$(PY) -m build --wheel --outdir dist

demo-model:  ## train the embedded demo model again, in an environment of its own (.venv-train)
	@[ -x .venv-train/bin/python ] || $(PYTHON) -m venv .venv-train
	@.venv-train/bin/python -m pip install --disable-pip-version-check --quiet \
	  "$$($(PYTHON) -m tools.llama_wheel)" -r tools/demo_model/requirements.txt
	@.venv-train/bin/python -m tools.demo_model.train $(ARGS)
	@.venv-train/bin/python -m tools.demo_model.evaluate
	@.venv-train/bin/python -m tools.demo_model.card

freeze:  ## write deploy/constraints.txt from what .venv holds
	@$(PYTHON) -m tools.install --freeze

clean:  ## remove environments, caches and builds; the llama.cpp wheel cache stays
	rm -rf .venv .venv-train build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis \
	  $(TYPESCRIPT)/node_modules $(TYPESCRIPT)/dist
	find bear_grpc tests tools benchmarks clients -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
