"""Parity with the authors' code: see goldens/README.md for where the files come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.pattern import Pattern
from secateur.prune.layer import prune_layer

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
PATTERNS = {"50": "50%", "60": "60%", "70": "70%", "2of4": "2:4", "4of8": "4:8"}
# Files that show faults of the authors' code: masks that are not N:M.
FAULTY = {"a_dsnot_wanda_2of4", "a_dsnot_magnitude_2of4", "a_dsnot_magnitude_4of8"}
NAMES = sorted(
    path.stem
    for path in GOLDENS.glob("a_*.safetensors")
    if path.stem not in ("a_inputs", "a_ria_50")
)


def pattern_of(name: str) -> str:
    return next(PATTERNS[part] for part in name.split("_") if part in PATTERNS)


def chain_of(name: str) -> tuple[str, dict[str, Any]]:
    """The chain and settings that a golden is named after."""
    method, *words = name.removeprefix("a_").split("_")
    if method == "dsnot":
        settings: dict[str, Any] = {
            "dsnot.metric": words[0],
            "dsnot.same_sign": "samesign" in words,
        }
        settings["dsnot.cycles"] = 10 if "c10" in words else 50
        if words[0] == "magnitude":
            settings["magnitude.among"] = "row"
        return f"{words[0]}+dsnot", settings
    if method in ("gblm", "gradient"):
        norm = next(word for word in words if word in ("l1", "l2"))
        return "gblm", {"gblm.norm": norm, "gblm.gradient_only": method == "gradient"}
    if "variant" in words:
        return method, {"wanda.variant": True}
    return method, {"admm.among": "row"} if "perout" in words else {}


def layer_file(name: str, folder: Path) -> Path:
    """The golden's input; what it does not repeat comes from the common fixture."""
    file = folder / f"{name}.safetensors"
    save_file(load_file(GOLDENS / "a_inputs.safetensors") | load_file(GOLDENS / file.name), file)
    return file


def run(name: str, folder: Path, compat: Any, pattern: str = "") -> dict[str, torch.Tensor]:
    method, settings = chain_of(name)
    out = folder / "out.safetensors"
    source = layer_file(name, folder)
    pattern = pattern or pattern_of(name)
    prune_layer(source, out, method, pattern, compat=compat, settings=settings)
    return load_file(out)


def test_every_kind_of_golden_is_here() -> None:
    kinds = {name.split("_")[1] for name in NAMES}
    assert kinds == {"magnitude", "wanda", "sparsegpt", "gblm", "gradient", "dsnot", "admm"}
    assert len(NAMES) == 41


@pytest.mark.parametrize("name", NAMES)
def test_reference_matches_the_authors_code(name: str, tmp_path: Path) -> None:
    golden = load_file(GOLDENS / f"{name}.safetensors")
    found = run(name, tmp_path, "reference")
    assert torch.equal(found["mask_pruned"], golden["mask_pruned"])
    if name.split("_")[1] in ("sparsegpt", "admm"):
        difference = (found["weight_out"] - golden["weight_out"]).norm()
        assert difference <= 1e-4 * golden["weight_out"].norm()
    else:
        assert torch.equal(found["weight_out"], golden["weight_out"])


@pytest.mark.parametrize(("pattern", "key"), [("50%", "50"), ("2:4", "2of4")])
def test_ria_matches_its_formula(pattern: str, key: str, tmp_path: Path) -> None:
    golden = load_file(GOLDENS / "a_ria_50.safetensors")
    found = run("a_ria_50", tmp_path, "reference", pattern)
    assert torch.equal(found["mask_pruned"], golden[f"mask_pruned_{key}"])


@pytest.mark.parametrize("name", [name for name in NAMES if "variant" not in name])
def test_exact_keeps_the_pattern_where_the_reference_may_not(name: str, tmp_path: Path) -> None:
    golden = load_file(GOLDENS / f"{name}.safetensors")
    removed = run(name, tmp_path, "exact")["mask_pruned"]
    Pattern.parse(pattern_of(name)).check(~removed)
    if name in FAULTY:
        with pytest.raises(ValueError, match="keeps"):
            Pattern.parse(pattern_of(name)).check(~golden["mask_pruned"])
        assert not torch.equal(removed, golden["mask_pruned"])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_are_stored_as_by_gblm(norm: str) -> None:
    from secateur.statistics import GradientStatistics

    golden = load_file(GOLDENS / f"a_gblm_{norm}_50.safetensors")
    for half, key in ((True, "grad_agg_ref_fp16"), (False, "grad_agg_fp32")):
        statistics = GradientStatistics(norm, half=half)  # type: ignore[arg-type]
        for gradient in golden["grads_per_sample"]:
            statistics.update(gradient)
        stored = golden[key].float()
        if half:
            assert torch.equal(statistics.result().norms, stored)
        else:
            torch.testing.assert_close(statistics.result().norms * 100, stored)


def test_moments_are_those_of_dsnot() -> None:
    from secateur.statistics import InputStatistics

    golden = load_file(GOLDENS / "a_dsnot_wanda_50.safetensors")
    inputs = InputStatistics(96, 4, torch.device("cpu"), frozenset({"norms", "moments"}))
    for sequence in golden["activations"]:
        inputs.update(sequence[None])
    assert torch.equal(inputs.square_norm, golden["scaler_row"])
    assert torch.equal(inputs.sequence_sum, golden["sum_metric_row"])
    assert torch.equal(inputs.within_variance, golden["var"])
    torch.testing.assert_close(inputs.mean, golden["mean"])


@pytest.mark.parametrize(
    ("method", "pattern", "settings", "why"),
    [
        ("admm", "4:8", {}, "makes 2:4 masks"),
        ("wanda+dsnot", "50%@8x1", {}, "has no 50%@8x1"),
        ("magnitude+dsnot", "50%", {}, "rows of equal sparsity"),
        ("wanda+dsnot", "70%", {"dsnot.cycles": 200, "dsnot.threshold": 0}, "runs out of weights"),
    ],
)
def test_reference_says_what_the_authors_code_cannot_do(
    method: str, pattern: str, settings: dict[str, Any], why: str
) -> None:
    from secateur.errors import UsageError

    source = GOLDENS / "a_inputs.safetensors"
    with pytest.raises(UsageError, match=why):
        prune_layer(source, None, method, pattern, compat="reference", settings=settings)
