"""Recipes: YAML 1.2, validation in sentences, --set, and the published schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.errors import UsageError
from secateur.pattern import Pattern
from secateur.recipe import Recipe, load_recipe, read_yaml, schema_json, validate

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),  # YAML 1.1 reads 124
        ("1e-4", 1e-4),  # PyYAML reads text
        ("on", "on"),  # YAML 1.1 reads True
        ("no", "no"),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("-3", -3),
        ("1.5", 1.5),
        ("true", True),
        ("~", None),
        ("", None),
        ("50%", "50%"),
        ("1_000", "1_000"),
    ],
)
def test_yaml_is_1_2(text: str, value: object) -> None:
    read = read_yaml(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


def test_yaml_fault_names_the_line() -> None:
    with pytest.raises(UsageError, match="line 2"):
        read_yaml("a: 1\nb: [", "recipe.yaml")


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_loads_a_file_and_applies_changes(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "model: m\noutput: o\nprune:\n  pattern: 2:4\n")
    recipe = load_recipe(path, ["prune.pattern=4:8", "bench.latency.rounds=7", "serve.threads=2"])
    assert recipe.prune.pattern == Pattern.parse("4:8")
    assert recipe.bench.latency.rounds == 7
    assert recipe.serve.threads == 2
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_last_matching_rule_counts(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path,
        "model: m\noutput: o\nprune:\n  pattern: 50%\n  layers:\n"
        "  - {match: '*.down_proj', pattern: dense}\n"
        "  - {match: 'model.layers.0.*', pattern: 4:8}\n",
    )
    prune = load_recipe(path).prune
    assert str(prune.pattern_of("model.layers.1.mlp.up_proj")) == "50%"
    assert str(prune.pattern_of("model.layers.1.mlp.down_proj")) == "dense"
    assert str(prune.pattern_of("model.layers.0.mlp.down_proj")) == "4:8"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prune: {patern: 2:4}", "did you mean 'pattern'"),
        ("prune: {layers: [{match: x, patten: 2:4}]}", "did you mean 'pattern'"),
        ("calibration: {sample: 3}", "did you mean 'samples'"),
        ("promt: 1", "did you mean 'prune'|choose one of"),
        ("prune: {pattern: 4:2}", "N of N:M is the number kept"),
        ("prune: {pattern: 124}", "'124' is not understood"),
        ("calibration: {samples: 0}", "calibration.samples = 0"),
        ("calibration: {samples: many}", "calibration.samples = 'many'"),
        ("serve: {threads: 0}", "serve.threads"),
        ("version: 2", "version"),
    ],
)
def test_faults_are_sentences_with_the_fix(tmp_path: Path, content: str, says: str) -> None:
    path = recipe_file(tmp_path, f"model: m\noutput: o\n{content}\n")
    with pytest.raises(UsageError, match=says) as refusal:
        load_recipe(path)
    assert refusal.value.fix
    assert "pydantic" not in str(refusal.value)


@pytest.mark.parametrize("change", ["prune.pattern", "=3", "model.x=1"])
def test_set_needs_a_key_and_a_value(tmp_path: Path, change: str) -> None:
    path = recipe_file(tmp_path, "model: m\noutput: o\n")
    with pytest.raises(UsageError, match="--set"):
        load_recipe(path, [change])


def test_missing_file_and_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="not a mapping"):
        load_recipe(recipe_file(tmp_path, "- 1\n"))
    with pytest.raises(UsageError, match="'model' is missing"):
        load_recipe(recipe_file(tmp_path, "output: o\n"))


def test_recipes_are_frozen() -> None:
    recipe = validate(Recipe, {"model": "m", "output": "o"}, "x")
    with pytest.raises(ValueError, match="frozen"):
        recipe.model = "other"


def test_published_schema_is_current() -> None:
    """Regenerate with `make docs`."""
    published = (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    assert json.loads(published) == json.loads(schema_json())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).version == 1
