"""All four stages from one recipe, on a tiny model and on a real GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import EnvironmentFault, ModelError
from secateur.source import cache_directory, resolve_model

Command = Callable[..., Any]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny}\noutput: {tmp_path / 'out'}\n"
        "calibration: {samples: 4, length: 32}\n"
        "prune: {pattern: 2:4}\n"
        "compile: {values: bf16}\n"
        "bench:\n  accuracy: {window: 32, windows: 4}\n"
        "  latency: {prompt: 16, new_tokens: 4, rounds: 2, min_seconds: 0}\n"
    )
    return path


def test_one_recipe_runs_all_stages_once(
    recipe: Path, tmp_path: Path, secateur_command: Command
) -> None:
    first = secateur_command("run", recipe)
    assert first.returncode == 0, first.stderr
    assert "answered: " in first.stderr
    assert "perplexity" in first.stdout
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    keys = {"bytes", "perplexity", "kl", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert {name: set(column) for name, column in summary.items()} == dict.fromkeys(
        ("dense", "sparse", "ratio"), keys
    )
    assert summary["dense"]["kl"] == 0
    assert summary["sparse"]["kl"] > 0
    assert summary["ratio"]["bytes"] < 1
    before = (out / "pruned" / "timings.json").read_text()

    again = secateur_command("run", recipe, "--json", "-q")
    assert json.loads(again.stdout).keys() == summary.keys()
    assert again.stderr.count("==") == 0
    assert (out / "pruned" / "timings.json").read_text() == before

    other = secateur_command("run", recipe, "--set", "prune.pattern=1:4")
    assert other.returncode == 2
    assert "prune.pattern was '2:4', now '1:4'" in other.stderr


def test_pruning_and_healing_in_turns(
    tiny: Path, text_file: Path, tmp_path: Path, secateur_command: Command
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(
        f"model: {tiny}\noutput: {out}\n"
        f"calibration: {{data: {text_file}, samples: 4, length: 32}}\n"
        "prune: {method: adapt+lsq, pattern: 30%, multiple: 4}\n"
        f"heal: {{data: {text_file}, tokens: 512, length: 32, rounds: 2, rate: 1e-3}}\n"
        "compile: {values: int8, quantize: rtn}\n"
        f"bench:\n  accuracy: {{data: {text_file}, window: 32, windows: 4}}\n"
        "  latency: {prompt: 16, new_tokens: 4, rounds: 2, min_seconds: 0}\n"
    )
    ran = secateur_command("run", path)
    assert ran.returncode == 0, ran.stderr
    sizes = [
        sum(layer["shape"][0] * layer["shape"][1] for layer in manifest["layers"].values())
        for manifest in (
            json.loads((out / f"pruned-{number}" / "manifest.json").read_text())
            for number in (1, 2)
        )
    ]
    whole = 2 * (32 * 32 * 3 + 3 * 32 * 48)
    assert 0.6 * whole < sizes[1] <= 0.7 * whole < sizes[0] <= 0.85 * whole
    healed = json.loads((out / "healed-2" / "manifest.json").read_text())
    assert healed["recipe"]["heal"]["tokens"] == 256
    again = secateur_command("run", path, "-q")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("==") == 0


@pytest.mark.parametrize(
    ("compile_", "kept"), [("", "pruned"), ("compile: {values: bf16}", "narrowed")]
)
def test_smaller_matrices_need_no_packing(
    compile_: str, kept: str, tiny: Path, text_file: Path, tmp_path: Path, secateur_command: Command
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(
        f"model: {tiny}\noutput: {out}\n"
        f"calibration: {{data: {text_file}, samples: 4, length: 32}}\n"
        f"prune: {{method: adapt, pattern: 30%, multiple: 4}}\n{compile_}\n"
        f"bench:\n  accuracy: {{data: {text_file}, window: 32, windows: 4}}\n"
        "  latency: {prompt: 16, new_tokens: 4, rounds: 2, min_seconds: 0}\n"
    )
    ran = secateur_command("run", path, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["ratio"]["bytes"] < 1
    assert (out / kept / "config.json").exists()
    assert not (out / "packed").exists()


def test_the_real_model_comes_out_of_its_gguf_file(smollm2: Path, tmp_path: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert resolve_model(str(smollm2)) == smollm2
    gguf = ROOT / "out" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert resolve_model(str(gguf), smollm2.parent) == smollm2  # imported once


def test_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match="cannot read"):
        resolve_model(str(broken), tmp_path)
    with pytest.raises(ModelError, match="no GGUF file"):
        resolve_model(str(tmp_path / "none.gguf"))
    with pytest.raises(ModelError, match="no model at"):
        resolve_model("just-a-name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((EnvironmentFault, ModelError)):
        resolve_model("secateur-tests/none")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("SECATEUR_CACHE")
    assert cache_directory().name == "secateur"
