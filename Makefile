# Everything runs in .venv, which the first target makes; a stamp file says what is installed in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -q --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test test-slow compatibility processors fuzz test-oldest test-newest smoke-versions browser lint types structure zoo
.PHONY: bench gpu clean

demo: $(VENV)/.demo-installed
	$(BIN)/foveate demo --out demo/

test: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# What `test` leaves out: the same behaviour in more models, whole programs from start to end. CI runs both.
test-slow: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# The engine under the oldest and the newest transformers that pyproject.toml allows. Their environments see all of
# $(VENV) but transformers and what that one wants in another version, so that torch is never installed again.
OLDEST = $(shell sed -n 's/.*"transformers>=\([^,]*\),<[^"]*".*/transformers==\1/p' pyproject.toml)
NEWEST = $(shell sed -n 's/.*"transformers>=[^,]*,\(<[^"]*\)".*/transformers\1/p' pyproject.toml)
SMOKE := tests/engine/test_compat.py tests/engine/test_usage.py

test-oldest test-newest: test-%: .venv-%/.installed
	@.venv-$*/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 -m "slow or not slow" tests/engine tests/reducers \
		tests/test_goldens.py

smoke-versions: .venv-oldest/.installed .venv-newest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 $(SMOKE)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 $(SMOKE)

# Mixed requests, each row held against the same row alone: FUZZ_REQUESTS=20000 FUZZ_SEED=0 make fuzz. Goes on where it was
# stopped; FUZZ_SHARD=0/2 and 1/2 share the work between two processes.
fuzz: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz

# What every image-text-to-text class of transformers gets from every method, and the page that says so. A stopped run goes
# on from build/compatibility.json.
compatibility: .venv-vision/.installed
	OMP_NUM_THREADS=1 .venv-vision/bin/python -m tests.catalogue --json build/compatibility.json --page docs/compatibility.md
	cp build/compatibility.json docs/

# transformers' own processors around a tiny model of each family, with photographs and videos; LoRA, int8, offload.
processors: .venv-vision/.installed
	OMP_NUM_THREADS=1 .venv-vision/bin/python -m pytest -n 2 -m "slow or not slow" tests/processors

# Chromium comes from the system: Debian's, installed here when missing and one may.
browser: $(VENV)/.browser-installed
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && apt-get -q update && apt-get -qy install chromium; } \
		|| { echo "make browser needs chromium (apt-get install chromium)" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

lint: $(VENV)/.test-installed
	$(BIN)/ruff check $(wildcard src recipes tests benchmarks)
	$(BIN)/ruff format --check $(wildcard src recipes tests benchmarks)

types: $(VENV)/.test-installed
	$(BIN)/mypy

structure: $(VENV)/.test-installed
	$(BIN)/python -m pytest tests/test_structure.py

zoo: $(VENV)/.test-installed
	$(BIN)/python -m recipes.tiny_llava
	$(BIN)/python -m recipes.tiny_clip
	$(BIN)/python -m recipes.tiny_vilt

bench: $(VENV)/.demo-installed
	$(BIN)/python benchmarks/speed.py --json benchmarks/results/speed.json

# For a machine with one NVIDIA GPU: under 8 minutes, no network. `python benchmarks/gpu.py --small` tries the script on a CPU.
gpu: $(VENV)/.demo-installed
	$(BIN)/python benchmarks/gpu.py --json benchmarks/results/gpu.json

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-vision demo build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

.venv-oldest/.installed: WANTED = --upgrade "$(OLDEST)"
.venv-newest/.installed: WANTED = --upgrade "$(NEWEST)"
.venv-vision/.installed: WANTED = --no-deps timm torchvision av num2words docopt torchao
.venv-oldest/.installed .venv-newest/.installed .venv-vision/.installed: $(VENV)/.test-installed
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/_beneath.pth
	$(BIN)/python -m pip --python $(@D)/bin/python -q --disable-pip-version-check install --no-compile $(WANTED)
	@touch $@

$(VENV)/.demo-installed: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[data]"
	@touch $@

$(VENV)/.test-installed: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[test]"
	@touch $@ $(VENV)/.demo-installed

$(VENV)/.browser-installed: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[test,browser]"
	@touch $@ $(VENV)/.test-installed $(VENV)/.demo-installed
