"""Healing: towards the dense model, under the same masks, and as if it had never been cut off."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.artifact import Manifest
from secateur.checkpoint import Checkpoint, file_sha256
from secateur.errors import ModelError, UsageError
from secateur.model import load_causal_lm
from secateur.prune import HealResult, heal_model, prune_model, share_of_round
from secateur.prune.distill import (
    LowRank,
    learning_rate,
    state_error,
    token_divergence,
)
from secateur.prune.heal import check_masks, read_masks
from secateur.prune.training import Training
from secateur.recipe import Calibration, Heal, Prune

SHORT: dict[str, Any] = {"tokens": 1280, "length": 32, "batch": 4, "every": 3, "held_out": 4}


@pytest.fixture(scope="module")
def pruned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(pattern: str) -> Path:
        if pattern not in made:
            made[pattern] = tmp_path_factory.mktemp("pruned") / "out"
            recipe = Prune.model_validate({"method": "magnitude", "pattern": pattern})
            prune_model(str(tiny), made[pattern], recipe, Calibration(data="none"), quiet=True)
        return made[pattern]

    return get


@pytest.fixture
def heal(tiny: Path, text_file: Path) -> Callable[..., HealResult]:
    def run(model: Path, output: Path, **settings: Any) -> HealResult:
        wanted = SHORT | {"teacher": str(tiny), "data": str(text_file), "rate": 5e-3} | settings
        return heal_model(model, output, Heal.model_validate(wanted), quiet=True)

    return run


@pytest.mark.parametrize("pattern", ["2:4", "50%", "50%@16x1"])
@pytest.mark.parametrize("train", ["kept", "lora", "norms"])
def test_masks_stay_and_the_model_comes_closer(
    pattern: str, train: str, pruned: Callable[[str], Path], heal: Any, tmp_path: Path
) -> None:
    before, after = pruned(pattern), tmp_path / "healed"
    rate = 5e-3 if train == "kept" else 2e-2
    result = heal(before, after, train=train, rate=rate, rank=4, hidden=0.1)
    assert result.after < 0.97 * result.before
    assert result.tokens == 1280
    assert file_sha256(after / "masks.safetensors") == file_sha256(before / "masks.safetensors")
    old, new = Checkpoint(before), Checkpoint(after)
    masks = read_masks(after, Manifest.read(after).layers)
    assert masks
    for name in old.names():
        a, b = old.load(name), new.load(name)
        mask = masks.get(name, torch.ones_like(a, dtype=torch.bool))
        assert torch.equal(b[~mask], torch.zeros_like(b[~mask]))
        inside = ".layers." in name
        changes = inside and a.ndim == 2 and train != "norms"
        changes = changes or a.ndim == 1
        assert torch.equal(a, b) != changes, name
        if changes and a.ndim == 2:
            assert (a != b)[mask].double().mean() > 0.5


def test_a_low_rank_change_is_one_under_its_mask(
    pruned: Callable[[str], Path], heal: Any, tmp_path: Path
) -> None:
    heal(pruned("50%"), tmp_path / "healed", train="lora", rank=2)
    name = "model.layers.0.mlp.gate_proj.weight"
    old, new = (Checkpoint(path).load(name) for path in (pruned("50%"), tmp_path / "healed"))
    mask = read_masks(tmp_path / "healed", Manifest.read(tmp_path / "healed").layers)[name]
    low = LowRank(mask, old.shape, 2)
    assert torch.equal(low(old), old)
    torch.nn.init.normal_(low.b)
    expected = old + (low.b @ low.a) * mask
    torch.testing.assert_close(low(old), expected)
    # What was learned: of rank 2 where two dense rows and columns of the mask can be compared.
    change = (new - old)[mask]
    assert change.abs().max() > 0


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    pruned: Callable[[str], Path], heal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = heal(pruned("2:4"), tmp_path / "whole")
    step, calls = Training._train, 0

    def cut(self: Training) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # two steps after what was kept last
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Training, "_train", cut)
    with pytest.raises(KeyboardInterrupt):
        heal(pruned("2:4"), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    again = heal(pruned("2:4"), tmp_path / "cut")
    assert calls == 6 + (whole.steps[0] - 3)
    assert again.manifest == whole.manifest


def test_it_stops_when_it_gets_worse_and_keeps_the_best(
    pruned: Callable[[str], Path], heal: Any, tmp_path: Path
) -> None:
    before = pruned("2:4")
    result = heal(before, tmp_path / "healed", rate=30.0, every=1, patience=2, tokens=12800)
    assert result.stopped_early
    assert result.after == result.before  # nothing was better than the beginning
    old, new = Checkpoint(before), Checkpoint(tmp_path / "healed")
    assert all(torch.equal(old.load(name), new.load(name)) for name in old.names())


def test_a_narrow_model_is_healed(tiny: Path, text_file: Path, heal: Any, tmp_path: Path) -> None:
    recipe = Prune.model_validate({"method": "adapt", "pattern": "30%", "multiple": 4})
    text = Calibration(data=str(text_file), samples=4, length=32)
    prune_model(str(tiny), tmp_path / "narrow", recipe, text, quiet=True)
    result = heal(tmp_path / "narrow", tmp_path / "healed", checkpointing=True, rate=1e-3)
    assert result.after < 0.97 * result.before
    assert Manifest.read(tmp_path / "healed").kind == "narrowed"
    load_causal_lm(tmp_path / "healed")


def test_the_divergence_is_that_of_the_probabilities() -> None:
    torch.manual_seed(0)
    own, dense = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = 0.0
    for sequence in range(2):
        for token in range(3):
            p, q = dense[sequence, token].softmax(0), own[sequence, token].softmax(0)
            expected += float((p * (p / q).log()).sum()) / 6
    assert float(token_divergence(own, dense)) == pytest.approx(expected, rel=1e-5)
    assert float(token_divergence(own, own)) == pytest.approx(0, abs=1e-6)
    error = state_error([own, dense], [dense, dense])
    assert float(error) == pytest.approx(
        float((own - dense).square().sum() / dense.square().sum()) / 2
    )


@given(steps=st.integers(1, 500), peak=st.floats(1e-6, 1))
def test_the_rate_rises_once_and_falls_once(steps: int, peak: float) -> None:
    rates = [learning_rate(step, steps, peak) for step in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(peak)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert learning_rate(steps, steps, peak) == pytest.approx(0, abs=1e-9) or math.isclose(steps, 1)


def test_revived_weights_are_found(pruned: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(pruned("2:4"), tmp_path / "broken")
    masks = read_masks(broken, Manifest.read(broken).layers)
    check_masks(broken, masks)
    name = "model.layers.1.mlp.up_proj.weight"
    file = Checkpoint(broken).file_of(name)
    tensors = load_file(file)
    row, column = (~masks[name]).nonzero()[5]
    tensors[name][row, column] = 1e-8
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match=name):
        check_masks(broken, masks)


def test_what_cannot_be_healed_is_refused(
    tiny: Path,
    pruned: Callable[[str], Path],
    make_model: Callable[..., Path],
    heal: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match="no directory that `secateur prune` wrote"):
        heal(tiny, tmp_path / "out")
    with pytest.raises(UsageError, match="give it with --teacher"):
        heal(pruned("2:4"), tmp_path / "out", teacher=None)
    with pytest.raises(ModelError, match="windows of 64 tokens"):
        heal(pruned("2:4"), tmp_path / "out", length=64, held_out=200)
    other = make_model(tmp_path / "other", vocab_size=300)
    with pytest.raises(ModelError, match="knows 300 tokens"):
        heal(pruned("2:4"), tmp_path / "more", teacher=str(other))
    deeper = make_model(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(UsageError, match="3 before"):
        heal(pruned("2:4"), tmp_path / "deep", teacher=str(deeper), hidden=1.0)


def test_the_command_heals(
    tiny: Path,
    pruned: Callable[[str], Path],
    text_file: Path,
    secateur_command: Callable[..., Any],
    tmp_path: Path,
) -> None:
    options = ["--teacher", tiny, "--data", text_file, "--tokens", 256, "--length", 32]
    ran = secateur_command("heal", pruned("2:4"), "-o", tmp_path / "healed", *options, "-q")
    assert ran.returncode == 0, ran.stderr
    assert "healed on 256 tokens" in ran.stdout
    assert (tmp_path / "healed" / "manifest.json").exists()


@given(percent=st.integers(5, 90), rounds=st.integers(1, 9), tokens=st.integers(9, 10**6))
def test_rounds_add_up(percent: int, rounds: int, tokens: int) -> None:
    prune = Prune.model_validate({"method": "adapt", "pattern": f"{percent}%"})
    heal = Heal(tokens=tokens, rounds=rounds)
    shares = [share_of_round(prune, heal, number) for number in range(rounds)]
    left = 1.0
    for number, (own, _) in enumerate(shares):
        before = left
        left *= 1 - float(own.pattern.removed)
        assert before - left == pytest.approx(percent / 100 / rounds, abs=2e-6 * (number + 1))
    assert sum(own.tokens for _, own in shares) == tokens


def test_rounds_of_zeroing_methods_are_refused() -> None:
    with pytest.raises(UsageError, match="in 2 rounds"):
        share_of_round(Prune(), Heal(rounds=2), 0)
