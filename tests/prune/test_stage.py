"""The prune stage on real directories: masks, resume, reproducibility, and bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.artifact import Manifest
from secateur.bits import unpack_mask
from secateur.checkpoint import Checkpoint
from secateur.errors import ModelError, SecateurError, UsageError
from secateur.model import load_causal_lm
from secateur.pattern import Pattern
from secateur.prune import plan, prune_model
from secateur.recipe import Calibration, Prune

PATTERNS = ["2:4", "4:8", "1:4", "50%", "30%", "50%@4x1", "50%@8x1", "2:4@16x1"]


def prune_with(text: Path | str, **settings: Any) -> dict[str, Any]:
    data = Calibration(data=str(text), samples=4, length=32)
    return {
        "prune": Prune.model_validate({"method": "wanda"} | settings),
        "calibration": data,
        "quiet": True,
    }


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of an artifact but the one that holds clock times."""
    files = [f for f in directory.iterdir() if f.name != "timings.json"]
    return {f.name: f.read_bytes() for f in files}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_every_pattern_is_what_the_output_holds(
    method: str, pattern: str, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    result = prune_model(
        str(tiny), tmp_path / "out", **prune_with(text_file, method=method, pattern=pattern)
    )
    before, after = Checkpoint(tiny), Checkpoint(tmp_path / "out")
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    assert before.names() == after.names()
    assert len(masks) == 14
    wanted = Pattern.parse(pattern)
    for name in before.names():
        old, new = before.load(name), after.load(name)
        if name not in masks:
            assert torch.equal(old, new)
            continue
        mask = unpack_mask(masks[name], old.shape[1]).repeat_interleave(wanted.rows, dim=0)
        wanted.check(mask)
        assert torch.equal(new, torch.where(mask, old, 0.0))
        assert not torch.signbit(new[~mask]).any()
        facts = result.manifest.layers[name.removesuffix(".weight")]
        assert facts.sparsity == pytest.approx(1 - mask.double().mean().item())
        assert facts.relative_error is not None
        assert 0 < facts.relative_error < 1
    assert load_causal_lm(tmp_path / "out").config.model_type == "llama"


def test_wanda_equals_a_plain_reference(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """All blocks, from the formula, on a whole model with hooks; pruned inputs propagate."""
    options = prune_with(text_file, pattern="2:4")
    prune_model(str(tiny), tmp_path / "out", **options)
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    model = load_causal_lm(tiny)
    for index, block in enumerate(model.model.layers):
        for name, linear, mask in wanda_of_block(model, block, tokens_of(tiny, options)):
            assert torch.equal(
                unpack_mask(masks[f"model.layers.{index}.{name}.weight"], mask.shape[1]), mask
            )
            linear.weight.data *= mask


def tokens_of(model: Path, options: dict[str, Any]) -> torch.Tensor:
    from secateur.calibration import draw_windows, read_text, token_ids
    from secateur.model import load_tokenizer

    calibration = options["calibration"]
    ids = token_ids(load_tokenizer(model), read_text(calibration.data))
    return draw_windows(ids, calibration.samples, calibration.length, calibration.seed)


def wanda_of_block(
    model: Any, block: Any, tokens: torch.Tensor
) -> list[tuple[str, Any, torch.Tensor]]:
    """2:4 Wanda masks of one block: |W| times the norm of the inputs, two lowest of four go."""
    linears = [(n, m) for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
    squares = {n: torch.zeros(m.in_features) for n, m in linears}
    count = dict.fromkeys(squares, 0)

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            squares[name] *= count[name] / (count[name] + 1)
            count[name] += 1
            squares[name] += torch.norm(x.t(), p=2, dim=1) ** 2 / count[name]

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in linears]
    with torch.no_grad():
        for row in tokens:
            model(row[None])
    for handle in handles:
        handle.remove()
    found = []
    for name, linear in linears:
        score = linear.weight.detach().abs() * squares[name].sqrt()
        lowest = score.reshape(len(score), -1, 4).sort(dim=2, stable=True).indices[:, :, :2]
        mask = torch.ones_like(score, dtype=torch.bool).reshape(len(score), -1, 4)
        found.append((name, linear, mask.scatter(2, lowest, False).reshape(score.shape)))
    return found


def test_wanda_on_the_real_model_equals_the_reference(smollm2: Path, tmp_path: Path) -> None:
    """One block of SmolLM2, bit for bit."""
    data = Calibration(data="pydoc", samples=4, length=128)
    rules = [{"match": f"model.layers.{i}.*", "pattern": "dense"} for i in range(1, 30)]
    prune_model(
        str(smollm2),
        tmp_path / "out",
        Prune.model_validate({"method": "wanda", "pattern": "2:4", "layers": rules}),
        data,
        quiet=True,
    )
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    assert len(masks) == 7
    model = load_causal_lm(smollm2)
    tokens = tokens_of(smollm2, {"calibration": data})
    for name, _, mask in wanda_of_block(model, model.model.layers[0], tokens):
        found = unpack_mask(masks[f"model.layers.0.{name}.weight"], mask.shape[1])
        assert torch.equal(found, mask), name


def test_two_runs_give_the_same_bytes(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prune_model(str(tiny), tmp_path / name, **prune_with(text_file))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    options = prune_with(text_file)
    options["calibration"] = options["calibration"].model_copy(update={"seed": 1})
    prune_model(str(tiny), tmp_path / "c", **options)
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")


def test_killed_and_repeated_equals_uninterrupted(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """With text of the model's own, which must also be the same text again."""
    model = make_model(tmp_path / "model", num_hidden_layers=24)
    arguments = ["prune", model, "--samples", 8, "--length", 64, "-q"]
    command = [sys.executable, "-m", "secateur", *map(str, arguments), "-o"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, str(killed)])
    partial = killed.with_name("killed.partial")
    deadline = time.monotonic() + 120
    while not (partial / "facts-00003.json").exists():
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    again = subprocess.run([*command, str(killed)], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "resumed at block" in again.stdout
    subprocess.run([*command, str(whole)], check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert files_of(killed) == files_of(whole)


def test_layer_rules_and_what_does_not_fit(
    text_file: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    model = make_model(tmp_path / "model", intermediate_size=50)
    rules = [{"match": "*.q_proj", "pattern": "4:8"}, {"match": "*.k_proj", "pattern": "dense"}]
    options = prune_with(text_file, pattern="2:4", layers=rules)
    result = prune_model(str(model), tmp_path / "out", **options)
    layers = result.manifest.layers
    assert layers["model.layers.0.self_attn.q_proj"].pattern == "4:8"
    assert layers["model.layers.0.self_attn.k_proj"].kept_dense == "the recipe says so"
    down = layers["model.layers.1.mlp.down_proj"]
    assert (down.pattern, down.sparsity) == ("dense", 0.0)
    assert down.kept_dense == "2:4 does not fit: 50 inputs are not a multiple of 4"
    assert any(
        note.startswith("2 layers left dense, 2:4 does not fit") and "1.mlp.down_proj" in note
        for note in result.manifest.notes
    )
    strict = prune_with(text_file, strict=True)
    with pytest.raises(UsageError, match="down_proj cannot be 2:4"):
        prune_model(str(model), tmp_path / "strict", **strict)
    unmatched = prune_with(text_file, layers=[{"match": "*.qproj", "pattern": "dense"}])
    with pytest.raises(UsageError, match=r"'\*\.qproj' matches no linear"):
        prune_model(str(model), tmp_path / "unmatched", **unmatched)


def test_the_plan_tells_before_it_is_done(tiny: Path) -> None:
    rules = [{"match": "*.down_proj", "pattern": "dense"}]
    planned = plan(
        str(tiny), Prune.model_validate({"pattern": "1:4", "layers": rules}), Calibration()
    )
    assert len(planned.layers) == 14
    assert len(planned.pruned) == 12
    linear = sum(layer.weights for layer in planned.layers)
    down = 2 * 32 * 48
    assert planned.sparsity == pytest.approx(0.75 * (linear - down) / linear)


def test_magnitude_needs_no_text_but_wanda_does(tiny: Path, tmp_path: Path) -> None:
    result = prune_model(str(tiny), tmp_path / "m", **prune_with("none", method="magnitude"))
    assert all(facts.relative_error is None for facts in result.manifest.layers.values())
    with pytest.raises(UsageError, match="needs calibration text"):
        prune_model(str(tiny), tmp_path / "w", **prune_with("none", method="wanda"))


def test_text_and_context_cap_the_length(tiny: Path, tmp_path: Path, text_file: Path) -> None:
    options = prune_with(text_file)
    options["calibration"] = Calibration(data=str(text_file), samples=2, length=4096)
    result = prune_model(str(tiny), tmp_path / "a", **options)
    assert "calibration length 64 instead of 4096" in result.manifest.notes[0]
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    result = prune_model(str(tiny), tmp_path / "b", **prune_with(short))
    assert "calibration length 16 instead of 32" in result.manifest.notes[0]


def test_half_precision_keeps_its_type_and_bits(
    text_file: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halves, model / "model.safetensors", metadata={"format": "pt"})
    prune_model(str(model), tmp_path / "out", **prune_with(text_file))
    after = Checkpoint(tmp_path / "out")
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    for name, before in halves.items():
        new = after.load(name)
        assert new.dtype == torch.bfloat16
        kept = new != 0 if name in masks else torch.ones_like(new, dtype=torch.bool)
        assert torch.equal(new[kept], before[kept])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(
    value: float, text_file: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN or infinite"
    ):
        prune_model(str(model), tmp_path / "out", **prune_with(text_file))
    assert not (tmp_path / "out").exists()


def test_refusals(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no pruning method 'wnada'") as refusal:
        prune_model(str(tiny), out, **prune_with(text_file, method="wnada"))
    assert "did you mean 'wanda'" in refusal.value.fix
    with pytest.raises(UsageError, match="no device 'abacus'"):
        prune_model(str(tiny), out, **prune_with(text_file, device="abacus"))
    for name in ("", "nowhere/at/all", str(text_file), "x.gguf", "./org/name"):
        with pytest.raises(SecateurError):
            prune_model(name or str(tmp_path / "none"), out, **prune_with(text_file))
    prune_model(str(tiny), out, **prune_with(text_file))
    with pytest.raises(UsageError, match="already exists"):
        prune_model(str(tiny), out, **prune_with(text_file))
    manifest = Manifest.read(out)
    prune_model(str(tiny), out, **prune_with(text_file, pattern="4:8"), overwrite=True)
    assert Manifest.read(out).recipe != manifest.recipe


def test_no_bos_token_means_no_text_of_its_own(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    model = make_model(tmp_path / "model", bos_token_id=None, eos_token_id=None)
    with pytest.raises(ModelError, match="no bos_token_id"):
        prune_model(str(model), tmp_path / "out", **prune_with("self"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "mixtral", "qwen2_moe"])
def test_permuting_channels_changes_the_order_and_not_the_model(
    family: str, text_file: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """The dense model whose rows and columns moved computes the same; more of it is kept."""
    dense = make_model(tmp_path / "dense", family)
    options = prune_with(text_file, pattern="2:4", permute=True)
    moved = prune_model(str(dense), tmp_path / "moved", **options).manifest
    plain = prune_model(
        str(dense), tmp_path / "plain", **prune_with(text_file, pattern="2:4")
    ).manifest
    consumers = [name for name, facts in moved.layers.items() if "permute" in facts.steps]
    assert consumers
    assert sum(moved.layers[name].steps["permute"]["moved"] for name in consumers)
    errors = [
        sum(facts.relative_error or 0 for facts in manifest.layers.values())
        for manifest in (moved, plain)
    ]
    assert errors[0] < errors[1]

    old, new = Checkpoint(dense), Checkpoint(tmp_path / "moved")
    for name in new.names():  # nothing but the order of some rows and columns differs
        before, after = old.load(name), new.load(name)
        if not name.endswith(".weight") or name.removesuffix(".weight") not in moved.layers:
            assert torch.equal(before.flatten().sort()[0], after.flatten().sort()[0])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "opt", "mixtral"])
def test_the_dense_model_with_permuted_channels_computes_the_same(
    family: str,
    text_file: Path,
    tmp_path: Path,
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from secateur.prune.block import Block

    def leave_dense(block: Block, layer: Any, *_: object) -> None:
        block._note(layer, 0.0, None, {})

    monkeypatch.setattr(Block, "_solve", leave_dense)
    dense = make_model(tmp_path / "dense", family)
    prune_model(str(dense), tmp_path / "out", **prune_with(text_file, pattern="2:4", permute=True))
    old, new = Checkpoint(dense), Checkpoint(tmp_path / "out")
    assert any(not torch.equal(old.load(name), new.load(name)) for name in old.names())
    tokens = torch.randint(0, 258, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (load_causal_lm(d)(tokens).logits for d in (dense, tmp_path / "out"))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_permutation_is_refused_where_it_makes_no_sense(
    tiny: Path, text_file: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    gpt2 = make_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UsageError, match="no channels of 'gpt2' can be permuted"):
        plan(str(gpt2), Prune(permute=True), Calibration())
    with pytest.raises(UsageError, match="permuted for N:M patterns"):
        plan(str(tiny), Prune.model_validate({"pattern": "50%", "permute": True}), Calibration())


@pytest.mark.parametrize("allocate", ["owl", "alphapruning"])
def test_allocation_keeps_the_budget_and_follows_its_measure(
    allocate: str, text_file: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """Blocks differ, their mean does not; rows round down by less than a column."""
    dense = make_model(
        tmp_path / "dense", num_hidden_layers=4, hidden_size=64, intermediate_size=128
    )
    options = prune_with(text_file, pattern="70%", allocate=allocate, method="magnitude")
    manifest = prune_model(str(dense), tmp_path / "out", **options).manifest
    weights = {name: facts.shape[0] * facts.shape[1] for name, facts in manifest.layers.items()}
    removed = sum(facts.sparsity * weights[name] for name, facts in manifest.layers.items())
    assert removed / sum(weights.values()) == pytest.approx(0.7, abs=2e-3)
    patterns = [manifest.layers[f"model.layers.{i}.mlp.up_proj"].pattern for i in range(4)]
    assert len(set(patterns)) > 1
    for index, pattern in enumerate(patterns):
        block = [f for name, f in manifest.layers.items() if f".{index}." in name]
        assert {facts.pattern for facts in block} == {pattern}


def test_an_allocation_leaves_rules_alone_and_needs_a_percentage(
    tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    rule = {"match": "*.down_proj", "pattern": "2:4"}
    options = prune_with(text_file, pattern="50%", allocate="owl", layers=[rule])
    layers = prune_model(str(tiny), tmp_path / "out", **options).manifest.layers
    assert {f.pattern for name, f in layers.items() if "down_proj" in name} == {"2:4"}
    with pytest.raises(UsageError, match="leaves nothing to allocate"):
        plan(str(tiny), Prune(allocate="owl"), Calibration())
    with pytest.raises(UsageError, match="'owl' needs calibration text"):
        prune_model(
            str(tiny),
            tmp_path / "none",
            Prune.model_validate({"pattern": "50%", "allocate": "owl", "method": "magnitude"}),
            Calibration(data="none"),
        )
