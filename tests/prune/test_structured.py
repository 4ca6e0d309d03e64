"""Structured methods: what goes, and that what stays computes what it should."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from secateur.architecture import Parts
from secateur.checkpoint import Checkpoint
from secateur.cli.prune_command import show_pruned
from secateur.errors import UsageError
from secateur.model import load_causal_lm
from secateur.prune import prune_model
from secateur.prune.adapt import importance, next_removed
from secateur.prune.compensate import bias_of_removed, refitted
from secateur.prune.narrowed import NarrowedModel, Survey, mean_cosine
from secateur.prune.narrowing import Narrowing
from secateur.prune.shape import Kept
from secateur.prune.structured import Budget, Choice, largest_within, width
from secateur.prune.taylor import pooled
from secateur.recipe import Calibration, Prune

GOLDENS = Path(__file__).parent.parent / "goldens"
PARTS = Parts()
HEADS, GROUPS, HEAD_DIM, CHANNELS = 8, 4, 8, 48
SIZES = {
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "hidden_size": 64,
    "head_dim": HEAD_DIM,
    "intermediate_size": CHANNELS,
    "query_pre_attn_scalar": HEAD_DIM,
}
CPU = torch.device("cpu")
IDS = torch.randint(2, 258, (6, 24), generator=torch.Generator().manual_seed(1))
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2")


def sized(make_model: Callable[..., Path], path: Path, family: str, **changes: Any) -> Path:
    keys = SIZES if family == "gemma2" else {k: v for k, v in SIZES.items() if "scalar" not in k}
    return make_model(path, family, **keys, **changes)


@pytest.fixture(scope="module")
def model_of(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = sized(make_model, tmp_path_factory.mktemp("wide") / family, family)
        return made[family]

    return get


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    from safetensors.torch import save_file

    save_file({"input_ids": IDS}, path)
    return Calibration(data=str(path))


def opened(path: Path, biases: bool = False) -> NarrowedModel:
    return NarrowedModel(Checkpoint(path), CPU, torch.float32, biases=biases)


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = load_causal_lm(path, torch.float32)(IDS).logits
    return result


def write(model: Path, output: Path, blocks: list[Kept | None], method: str = "adapt") -> Path:
    """The model with these heads and channels."""
    output.mkdir()
    recipe = Prune.model_validate({"method": method, "pattern": "1%"})
    wide = opened(model, biases=method.endswith("+bias"))
    run = Narrowing(output, wide, {"input_ids": IDS}, recipe, quiet=True)
    run._write_choice(choice := Choice(with_blocks(run.model, blocks)))
    run.write(choice)
    return output


def with_blocks(model: NarrowedModel, blocks: list[Kept | None]) -> Any:
    shape = model.original
    for index, kept in enumerate(blocks):
        shape = shape.with_block(index, kept)
    return shape


def test_the_schedule_is_the_authors() -> None:
    golden = load_file(GOLDENS / "adaptpruner_schedule.safetensors")
    states = golden["hidden_states"]
    found = importance([mean_cosine(before, after) for before, after in pairwise(states)])
    torch.testing.assert_close(found.float(), golden["importance_normalised"])
    removed = [0.0] * len(found)
    for expected in golden["sparsity_steps_1_to_5"]:
        removed = next_removed(removed, found, 1 / 50, 0.02)
        torch.testing.assert_close(torch.tensor(removed), expected)


def test_query_heads_are_pooled_with_their_own_kv_head() -> None:
    heads = torch.arange(8.0)
    assert pooled(heads, 2, "exact").tolist() == [1, 5, 9, 13]
    assert pooled(heads, 2, "reference").tolist() == [4, 6, 8, 10]  # heads j and j + 4


def kill(path: Path, groups: list[int], channels: list[int]) -> None:
    """Let some KV groups and channels of all blocks put out nothing."""
    from safetensors.torch import save_file

    tensors = load_file(path / "model.safetensors")
    rep = HEADS // GROUPS
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            for group in groups:
                tensor[:, group * rep * HEAD_DIM : (group + 1) * rep * HEAD_DIM] = 0
        if name.endswith("down_proj.weight"):
            tensor[:, channels] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["adapt", "llm-pruner", "flap"])
def test_what_contributes_nothing_goes_first(
    family: str,
    method: str,
    make_model: Callable[..., Path],
    text: Calibration,
    tmp_path: Path,
) -> None:
    """Heads are told apart: two groups of four are dead, and half of the channels."""
    dense = sized(make_model, tmp_path / "dense", family)
    kill(dense, [1, 2], list(range(0, CHANNELS, 2)))
    steps = {"adapt": {"adapt.step": 0.25, "adapt.amplitude": 0.0}, "flap": {}}
    ends = {"llm-pruner.first": 0, "llm-pruner.last": 0}
    recipe = {"method": method, "pattern": "50%", "multiple": 4}
    recipe["settings"] = steps.get(method, ends)
    result = prune_model(
        str(dense), tmp_path / "narrow", Prune.model_validate(recipe), text, quiet=True
    )
    torch.testing.assert_close(logits(tmp_path / "narrow"), logits(dense), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert "per_layer_config" not in config  # all alike: any program can open it
    shapes = {name.split(".")[-1]: layer.shape for name, layer in result.manifest.layers.items()}
    assert shapes["k_proj"] == (16, 64)
    assert shapes["down_proj"] == (64, 24)


KEPT = st.builds(
    lambda groups, channels: Kept(torch.tensor(sorted(groups)), torch.tensor(sorted(channels))),
    st.sets(st.integers(0, GROUPS - 1), min_size=1),
    st.sets(st.integers(0, CHANNELS - 1), min_size=1),
)


@settings(max_examples=3, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(blocks=st.lists(KEPT, min_size=3, max_size=3))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_model_is_the_wide_one_with_zeros(
    family: str,
    blocks: list[Kept],
    model_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Removing heads and channels is what zeroing the columns that read them is."""
    model = model_of(family)
    narrow = write(model, tmp_path_factory.mktemp("narrow") / "out", list(blocks))
    wide = load_causal_lm(model, torch.float32)
    rep = HEADS // GROUPS
    for layer, kept in zip(wide.model.layers, blocks, strict=True):
        heads = torch.zeros(GROUPS).index_fill(0, kept.groups, 1)
        channels = torch.zeros(CHANNELS).index_fill(0, kept.channels, 1)
        layer.self_attn.o_proj.weight.data *= heads.repeat_interleave(rep * HEAD_DIM)
        layer.mlp.down_proj.weight.data *= channels
    with torch.no_grad():
        expected = wide(IDS).logits
    assert (logits(narrow) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_taylor_scores_are_those_of_autograd(model_of: Callable[[str], Path]) -> None:
    """Streamed block by block, they are what the whole model's gradients give, unit by unit."""
    path = model_of("qwen3")
    streamed = opened(path)
    found = Survey(streamed, {"input_ids": IDS}).taylor(streamed.original, "first")
    model = load_causal_lm(path, torch.float32)
    for row in IDS:
        model(row[None], labels=row[None]).loss.backward()
    rep = HEADS // GROUPS
    for index, layer in enumerate(model.model.layers):
        salience = {
            name: (module.weight * module.weight.grad).abs()
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for group in range(GROUPS):
            keys = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
            queries = slice(group * rep * HEAD_DIM, (group + 1) * rep * HEAD_DIM)
            expected = salience[PARTS.keys][keys].sum() + salience[PARTS.values][keys].sum()
            expected += salience[PARTS.queries][queries].sum()
            expected += salience[PARTS.output][:, queries].sum()
            torch.testing.assert_close(found.groups[index][group], expected)
        expected = salience[PARTS.down].sum(0)
        expected = expected + sum(salience[name].sum(1) for name in PARTS.gates)
        torch.testing.assert_close(found.channels[index], expected)


def without(path: Path, gone: set[int]) -> Any:
    model = load_causal_lm(path, torch.float32)
    layers = [layer for number, layer in enumerate(model.model.layers) if number not in gone]
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model


def loss(model: Any) -> float:
    with torch.no_grad():
        options = {"use_cache": False}  # the cache counts the blocks of the config
        losses = [model(row[None], labels=row[None], **options).loss for row in IDS]
    return float(torch.stack(losses).mean())


def test_losses_without_blocks_are_those_of_shorter_models(
    model_of: Callable[[str], Path],
) -> None:
    path = model_of("llama")
    streamed = opened(path)
    shape = streamed.original.with_block(1, None)
    found = Survey(streamed, {"input_ids": IDS}).losses_without(shape, [0, 1, 2], len(IDS))
    assert set(found) == {0, 2}
    for block, value in found.items():
        assert value == pytest.approx(loss(without(path, {1, block})), rel=1e-5)


@pytest.mark.parametrize("method", ["shortgpt", "sleb"])
def test_the_block_goes_that_matters_least(
    method: str, model_of: Callable[[str], Path], text: Calibration, tmp_path: Path
) -> None:
    path = model_of("llama")
    settings = {"sleb.first": 0, "sleb.last": 0} if method == "sleb" else {}
    recipe = Prune.model_validate({"method": method, "pattern": "30%", "settings": settings})
    prune_model(str(path), tmp_path / "short", recipe, text, quiet=True)
    model = load_causal_lm(path, torch.float32)
    with torch.no_grad():
        states = model.model(IDS, output_hidden_states=True, use_cache=False).hidden_states
        after = [*states[1:-1], hooked(model, IDS)]
    cosines = [mean_cosine(x, y) for x, y in zip(states[:-1], after, strict=True)]
    losses = [loss(without(path, {block})) for block in range(3)]
    gone = max(range(3), key=cosines.__getitem__)
    if method == "sleb":
        gone = min(range(3), key=losses.__getitem__)
    with torch.no_grad():
        expected = without(path, {gone})(IDS, use_cache=False).logits
    torch.testing.assert_close(logits(tmp_path / "short"), expected)
    assert len(load_causal_lm(tmp_path / "short").model.layers) == 2


def hooked(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the last block puts out, before the norm."""
    seen: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


def test_least_squares_is_the_solution_of_the_damped_problem() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 12), torch.randn(200, 12) @ torch.randn(12, 12)
    kept = torch.tensor([0, 3, 4, 8, 11])
    gram = inputs.t() @ inputs
    found = refitted(weight, gram, kept, damping=0.01)
    # ‖(W x - Ŵ x_K)‖² + λ‖Ŵ - W_K‖² as one ordinary least-squares problem
    root = (0.01 * gram.diagonal().mean()).sqrt() * torch.eye(len(kept))
    rows = torch.cat([inputs[:, kept], root])
    wanted = torch.cat([inputs @ weight.t(), root @ weight[:, kept].t()])
    expected = torch.linalg.lstsq(rows.double(), wanted.double()).solution.t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_bias_is_what_is_missing_on_average() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 12), torch.randn(50, 12) + 1
    kept = torch.tensor([1, 2, 7])
    bias = bias_of_removed(weight, inputs.mean(0), kept)
    missing = inputs @ weight.t() - inputs[:, kept] @ weight[:, kept].t()
    torch.testing.assert_close(bias, missing.mean(0))


@pytest.mark.parametrize("compensation", ["lsq", "bias"])
def test_compensation_brings_blocks_closer(
    compensation: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first block, whose inputs are the same, is closer to the original with it."""
    path = model_of("llama")
    first = Kept(torch.tensor([0, 2]), torch.arange(0, CHANNELS, 2))
    blocks = [first, None, None]
    target = load_causal_lm(path, torch.float32).model.layers[:1]
    errors = {}
    for method in ("flap", f"flap+{compensation}"):
        narrow = load_causal_lm(write(path, tmp_path / method, list(blocks), method), torch.float32)
        whole = load_causal_lm(path, torch.float32)
        whole.model.layers = target
        with torch.no_grad():
            difference = hooked(narrow, IDS) - hooked(whole, IDS)
        errors[method] = float(difference.square().sum())
    # Random weights have activations of mean 0, for which a bias does little.
    assert (
        errors[f"flap+{compensation}"] < {"lsq": 0.9, "bias": 0.99}[compensation] * errors["flap"]
    )


def test_an_interrupted_run_goes_on(
    model_of: Callable[[str], Path],
    text: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = {"adapt.step": 0.08, "adapt.amplitude": 0.05, "adapt.sequences": 2}
    recipe = Prune.model_validate(
        {"method": "adapt", "pattern": "25%", "multiple": 4, "settings": steps}
    )
    arguments: Any = (str(model_of("llama")), recipe, text)
    whole = prune_model(arguments[0], tmp_path / "whole", *arguments[1:], quiet=True)
    taylor, calls = Survey.taylor, 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return taylor(*args)

    monkeypatch.setattr(Survey, "taylor", counted)
    with pytest.raises(KeyboardInterrupt):
        prune_model(arguments[0], tmp_path / "cut", *arguments[1:], quiet=True)
    assert not (tmp_path / "cut").exists()
    again = prune_model(arguments[0], tmp_path / "cut", *arguments[1:], quiet=True)
    steps_taken = next(iter(whole.manifest.layers.values())).steps["adapt"]["steps"]
    assert calls == steps_taken + 1 > 3
    assert again.manifest == whole.manifest


def test_the_summary_says_what_became_smaller(
    model_of: Callable[[str], Path], text: Calibration, tmp_path: Path
) -> None:
    """Of four heads none goes before a quarter of each block does, so MLPs bear it."""
    spared = {"llm-pruner.first": 0, "llm-pruner.last": 0}
    recipe = Prune.model_validate(
        {"method": "llm-pruner", "pattern": "9%", "multiple": 1, "settings": spared}
    )
    result = prune_model(str(model_of("llama")), tmp_path / "out", recipe, text, quiet=True)
    show_pruned(result, printed := io.StringIO())
    rows = {line.split()[0]: line.split() for line in printed.getvalue().splitlines() if line}
    attention, mlp = 64 * HEAD_DIM * (2 * HEADS + 2 * GROUPS), 64 * 3 * CHANNELS
    left = CHANNELS - -(-0.09 * (attention + mlp) // (64 * 3))
    assert rows["linear"] == ["linear", "layers", "shapes", "removed"]
    assert rows["q_proj"] == ["q_proj", "3", "64", "x", "64", "0.00", "%"]
    removed = f"{100 * (1 - left / CHANNELS):.2f}"
    assert rows["up_proj"] == ["up_proj", "3", f"{left:.0f}", "x", "64", removed, "%"]


@given(
    initial=st.integers(1, 500), removed=st.floats(0, 0.99), multiple=st.sampled_from([1, 4, 16])
)
def test_widths_are_whole_multiples_and_never_nothing(
    initial: int, removed: float, multiple: int
) -> None:
    found = width(initial, removed, multiple)
    assert 1 <= found <= initial
    assert found % multiple == 0 or found == initial
    assert initial - found <= initial * removed + 1e-6  # what goes is covered
    assert found == multiple or initial - found > initial * removed - multiple - 1e-6


@settings(deadline=None, max_examples=30)
@given(part=st.floats(0.03, 0.7), multiple=st.sampled_from([1, 4, 16]))
def test_the_budget_is_met_and_hardly_undershot(
    part: float, multiple: int, model_of: Callable[[str], Path]
) -> None:
    from secateur.prune.structured import cut_to

    original = opened(model_of("llama")).original
    generator = torch.Generator().manual_seed(0)
    groups = [torch.rand(GROUPS, generator=generator) for _ in original.blocks]
    channels = [torch.rand(CHANNELS, generator=generator) for _ in original.blocks]
    slopes = (1.0, 0.8, 0.5)  # blocks lose at different rates
    budget = Budget(int(original.weights * (1 - part)), multiple)

    def shape(t: float) -> Any:
        return cut_to(original, original, groups, channels, [t * s for s in slopes], multiple)

    if shape(1.0).weights > budget.weights:
        with pytest.raises(UsageError, match="stay at the least"):
            largest_within(budget, shape)
        return
    found = largest_within(budget, shape)[1]
    assert found.weights <= budget.weights
    step = max(original.group_weights, multiple * original.channel_weights)
    assert found.weights > budget.weights - 3 * step
