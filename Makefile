# Everything that a person, a hook or CI runs. `make help` lists it.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
# Downloads and the PyTorch environment are shared between clones.
CACHE ?= $(or $(LORA_COMPRESS_CACHE),$(HOME)/.cache/lora-compress)
BIN := .venv/bin
TORCH_ENV := $(CACHE)/torch-env
NATIVE := python/lora_compress/_native.abi3.so
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  %-14s %s\n", $$1, $$2}'

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or later is needed' >&2; exit 1; }
	$(PYTHON) -m venv .venv || { echo 'the venv module is missing (Debian: apt-get install python3-venv)' >&2; exit 1; }
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet 'maturin>=1.9.4,<2' click numpy opt_einsum pluggy rich threadpoolctl
	touch $@

$(NATIVE): .venv/ready $(RUST_SOURCES)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/maturin develop --release --quiet >/dev/null
	touch $@

# First-party plugins are installed as anybody would install them, but for their dependency on what is built here.
.venv/dev: .venv/ready $(wildcard plugins/*/pyproject.toml)
	$(BIN)/pip install --quiet --group lint --group test
	$(BIN)/pip install --quiet --no-deps $(patsubst %,--editable %,$(dir $(wildcard plugins/*/pyproject.toml)))
	touch $@

# PyTorch is large: one environment for all clones, made again when its requirements change. `flock` keeps two clones apart.
TORCH_KEY := $(shell sha256sum pyproject.toml | cut -c1-16)
$(TORCH_ENV)/ready-$(TORCH_KEY): pyproject.toml
	mkdir -p $(CACHE)
	flock $(CACHE)/torch-env.lock bash -c '$(PYTHON) -m venv $(TORCH_ENV) && \
	  $(TORCH_ENV)/bin/pip install --quiet --upgrade "pip>=25.1" && \
	  $(TORCH_ENV)/bin/pip install --quiet --group test --group torch click numpy opt_einsum pluggy rich threadpoolctl && touch $@'

.PHONY: build
build: $(NATIVE)  ## Build the compiled core into a virtual environment (.venv)

.PHONY: demo
demo: build  ## Extract, verify and merge on a real pair, and print what comes back
	$(BIN)/lora-compress demo

.PHONY: test
test: lint test-rust test-python test-torch  ## Lint and run all tests

.PHONY: lint
lint: lint-rust lint-python  ## Formats, linters, types, stubs, dependency directions

.PHONY: lint-rust
lint-rust:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --package lora-compress-core --no-deps --document-private-items --quiet

.PHONY: lint-python
lint-python: build .venv/dev
	$(BIN)/ruff format --check --quiet python plugins tests tools benchmarks examples
	$(BIN)/ruff check --quiet python plugins tests tools benchmarks examples
	$(BIN)/mypy
	@for plugin in plugins/*/; do \
	  (cd $$plugin && MYPYPATH=src $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml src tests) || exit 1; \
	done
	MYPYPATH=python $(BIN)/python -m mypy.stubtest lora_compress._native
	$(BIN)/lint-imports

.PHONY: test-rust
test-rust:  ## Rust tests: properties against f64 references, files, doctests
	cargo test --package lora-compress-core --quiet
	LORA_COMPRESS_KERNEL=portable cargo test --package lora-compress-core --test svd --quiet

# Needs nightly Rust and, for the adapter configuration, atheris. No allocation may exceed the input's size by more than a constant,
# and no input may take a second. `make fuzz FUZZ_RUNS=100000` for a moment.
FUZZ_RUNS ?= 10000000
FUZZ_TARGETS := header index torch pickle pattern
# Compiling a pattern is slow, and ours is safe code: without the address sanitizer it is five times as fast. Nobody counts
# allocations then; the whole process may take 256 MB.
SANITIZER_pattern := none
RSS_pattern := 256
.PHONY: fuzz
fuzz: $(FUZZ_TARGETS:%=fuzz-%) fuzz-adapter_config  ## Fuzz everything that reads a stranger's bytes, for minutes
fuzz-%:
	@command -v cargo-fuzz >/dev/null || cargo install --quiet cargo-fuzz
	mkdir -p rust/fuzz/target/found/$*
	cd rust && cargo +nightly fuzz run --fuzz-dir fuzz --sanitizer $(or $(SANITIZER_$*),address) $* fuzz/target/found/$* fuzz/corpus/$* -- \
	  -runs=$(FUZZ_RUNS) -timeout=1 -malloc_limit_mb=64 -rss_limit_mb=$(or $(RSS_$*),2048) -max_len=4096 -print_final_stats=1

fuzz-adapter_config: build .venv/dev
	$(BIN)/pip install --quiet --group fuzz
	mkdir -p rust/fuzz/target/found/adapter_config
	$(BIN)/python -m tools.fuzz_adapter_config rust/fuzz/target/found/adapter_config rust/fuzz/corpus/adapter_config \
	  -runs=$(FUZZ_RUNS) -timeout=1 -rss_limit_mb=2048 -max_len=4096 -print_final_stats=1

# Reports are tested in a real browser. Where Debian's cannot be installed, those tests say that they were skipped.
.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get install -y -qq --no-install-recommends chromium >/dev/null || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; }; } } || \
	  echo 'chromium is missing: the report is not tested in a browser (Debian: apt-get install chromium)' >&2

.PHONY: test-python
test-python: build .venv/dev chromium  ## Python tests that need no PyTorch (HYPOTHESIS_PROFILE=slow searches longer)
	$(BIN)/python -m pytest -q -m 'not torch'

.PHONY: test-torch
test-torch: build $(TORCH_ENV)/ready-$(TORCH_KEY)  ## Tests with PyTorch, transformers and PEFT, on real weights
	PYTHONPATH=$(PLUGINS) LORA_COMPRESS_CACHE=$(CACHE) $(TORCH_ENV)/bin/python -m pytest -q -m torch tests/torch

# Peers have environments of their own, shared between clones: scikit-learn joins PyTorch's, mergekit pins what it needs.
BENCH_JSON := docs/benchmarks
BENCH := PYTHONPATH=python $(TORCH_ENV)/bin/python benchmarks
MERGEKIT_ENV := $(CACHE)/mergekit-env
MERGEKIT := $(MERGEKIT_ENV)/bin/mergekit-extract-lora

$(TORCH_ENV)/bench-ready: $(TORCH_ENV)/ready-$(TORCH_KEY)
	$(TORCH_ENV)/bin/pip install --quiet scikit-learn ml_dtypes
	touch $@

$(MERGEKIT):
	$(PYTHON) -m venv $(MERGEKIT_ENV)
	$(MERGEKIT_ENV)/bin/pip install --quiet mergekit==0.1.5

# transformers reads SmolLM2 from a GGUF file.
$(TORCH_ENV)/bench-rank-ready: $(TORCH_ENV)/bench-ready
	$(TORCH_ENV)/bin/pip install --quiet gguf sentencepiece
	touch $@

.PHONY: bench bench-kernels bench-matrices bench-commands bench-rank bench-decompositions bench-resize bench-merge bench-training bench-gpu bench-loss bench-suggest
bench: bench-kernels bench-matrices bench-commands bench-rank bench-decompositions bench-resize bench-merge bench-training  ## Measure everything against peers and limits
bench-kernels: build $(TORCH_ENV)/bench-ready  ## Kernels against oneDNN
	$(BENCH)/kernel_rates.py --json $(BENCH_JSON)
bench-matrices: build $(TORCH_ENV)/bench-ready  ## One matrix against PyTorch and scikit-learn
	$(BENCH)/matrices.py --json $(BENCH_JSON)
bench-commands: build $(TORCH_ENV)/bench-ready $(MERGEKIT)  ## Whole commands against mergekit, and growth with layers (15 GB of disk)
	$(BENCH)/commands.py --work $(CACHE)/bench --mergekit $(MERGEKIT) --json $(BENCH_JSON)

bench-rank: build $(TORCH_ENV)/bench-rank-ready  ## Ranks on real fine-tunes: KL against bytes, scales, planning (makes the pairs once)
	$(BENCH)/ranks/ranks.py --cache $(CACHE) --json $(BENCH_JSON)
	$(BENCH)/ranks/scales.py --cache $(CACHE) --json $(BENCH_JSON)
	$(BENCH)/planning.py --work $(CACHE)/bench --json $(BENCH_JSON)

bench-suggest: build $(TORCH_ENV)/bench-rank-ready  ## Whether ranks from gradients help to train (an hour on a CPU)
	$(BENCH)/suggesting.py --cache $(CACHE) --task smollm2 --steps 40 --seeds 1 --json $(BENCH_JSON)
	$(BENCH)/suggesting.py --cache $(CACHE) --task minilm --steps 60 --seeds 2 --json $(BENCH_JSON)

PLUGINS := python:$(subst $() ,:,$(patsubst %,%src,$(wildcard plugins/*/)))
BENCH_PLUGINS := PYTHONPATH=$(PLUGINS) $(TORCH_ENV)/bin/python benchmarks
bench-decompositions: build $(TORCH_ENV)/bench-rank-ready  ## Every decomposition at equal bytes on real fine-tunes, and how long each takes (an hour)
	$(BENCH_PLUGINS)/three_factors.py --cache $(CACHE) --work $(CACHE)/bench --json $(BENCH_JSON)

# Sizes of 1B, 3B and 8B where there is a GPU, a tiny one where there is none.
bench-gpu: build $(TORCH_ENV)/ready-$(TORCH_KEY)  ## Training steps against PEFT's and a frozen model's
	$(BENCH_PLUGINS)/training.py --json $(BENCH_JSON)
bench-loss: build $(TORCH_ENV)/bench-rank-ready  ## Loss curves of pairs, three factors and a tensor train (half an hour)
	$(BENCH_PLUGINS)/loss_curves.py --cache $(CACHE) --json $(BENCH_JSON)

bench-merge: build $(TORCH_ENV)/bench-ready  ## Merging, against PEFT and a copy of the base
	$(BENCH)/merging.py --work $(CACHE)/bench --json $(BENCH_JSON)

bench-training: build $(TORCH_ENV)/bench-ready  ## Steps of training: the plugin path against hard-coded factors, and PEFT
	OMP_NUM_THREADS=1 $(BENCH_PLUGINS)/training_overhead.py --width 256 --tokens 256 --json $(BENCH_JSON)

bench-resize: build $(TORCH_ENV)/bench-ready  ## Resizing an adapter of an 8B model, against the dense way
	$(BENCH)/resizing.py --work $(CACHE) --json $(BENCH_JSON)

.PHONY: format
format: .venv/dev  ## Format Rust and Python
	cargo fmt --all
	$(BIN)/ruff format --quiet python plugins tests tools benchmarks examples
	$(BIN)/ruff check --quiet --fix python plugins tests tools benchmarks examples

.PHONY: help-check
help-check: build  ## Time `lora-compress --help`
	@for i in 1 2 3 4 5; do TIMEFORMAT='%R s'; time $(BIN)/lora-compress --help >/dev/null; done

.PHONY: clean
clean:  ## Remove what was built here (not the shared cache)
	rm -rf .venv target $(NATIVE)
