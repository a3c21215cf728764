# Two commands do everything on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
MINUTES ?= 60
TIMES ?= 12
BIN = $(VENV)/bin

.PHONY: demo test fuzz fuzz-package kills lint docs install clean

demo: $(BIN)/.demo  ## Build shards, train MSA-ViT-Ti on them, report recalls: make demo [UCM=folder with dataset_ucm.json and images/]
	$(BIN)/python examples/quickstart.py --out $(OUT) $(if $(UCM),--captions $(UCM)/dataset_ucm.json --images $(UCM)/images) $(ARGS)

test: install  ## Run the whole test suite: make test [ARGS="-k loss"]
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

fuzz: install  ## Fuzz the readers, each for so long; found cases go to tests/fuzz/corpus: make fuzz [MINUTES=60] [ARGS="tar csv"]
	$(BIN)/python tests/fuzz/run.py --minutes $(MINUTES) $(ARGS)

fuzz-package: install  ## Fuzz index files, configurations and results with fresh seeds: make fuzz-package [MINUTES=60]
	end=$$(( $$(date +%s) + 60 * $(MINUTES) )); while [ $$(date +%s) -lt $$end ]; do \
	  FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest -q tests/fuzz/test_fuzz_package.py || exit 1; done

kills: install  ## Kill builds, indexing, embedding ... at random moments, let them go on, compare: make kills [TIMES=12] [ARGS="embed"]
	$(BIN)/python tests/fuzz/kills.py --times $(TIMES) $(ARGS)

lint: install  ## Lint and type checks
	$(BIN)/ruff check .
	rm -rf out/types
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target out/types .
	cd out/types && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p msa_openclip  # as installed: one package

docs: $(BIN)/.docs  ## Build the site into out/site, without network, warnings as errors (Python 3.11 or later)
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(BIN)/.installed  ## Everything that `make test` and `make lint` need

$(BIN)/.demo: setup.py pyproject.toml  # the package and plots, all that the demo needs
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[plot]'
	touch $@

$(BIN)/.installed: $(BIN)/.demo  # all extras, the test suite and the tools besides
	$(BIN)/python -m pip install --quiet -e '.[all,test,dev]'
	touch $@

$(BIN)/.docs: $(BIN)/.demo  # the tools that build the site
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
