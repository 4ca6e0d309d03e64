"""Channel permutations: never worse than none, near the best, and invisible to the model."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.pattern import Pattern
from secateur.prune.masks import keep_highest
from secateur.prune.permute import (
    _exchanged,
    find_permutation,
    find_shared_permutation,
    output_columns,
    permuted_tensors,
    value_rows,
)

TWO_OF_FOUR = Pattern.parse("2:4")


pytestmark = pytest.mark.usefixtures("one_thread")


def make_score(rows: int, columns: int, seed: int, ties: bool = False) -> torch.Tensor:
    """Scores whose channels differ in size, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(columns, generator=generator).exp()
    score = torch.randn(rows, columns, generator=generator).abs() * sizes
    return (score * 2).round() if ties else score


def kept_score(score: torch.Tensor, pattern: Pattern) -> float:
    return float((score * keep_highest(score, pattern, "row")).sum(dtype=torch.float64))


def is_permutation(order: torch.Tensor) -> bool:
    return bool((order.sort().values == torch.arange(len(order))).all())


# The search.


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(["2:4", "1:4", "3:4", "4:8", "4:16", "2:4@4x1"]),
    groups=st.integers(1, 9),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    group=st.sampled_from([None, 1, 16, 40, 1000]),
)
def test_an_order_of_all_channels_that_never_keeps_less(
    pattern: str, groups: int, blocks: int, seed: int, ties: bool, group: int | None
) -> None:
    shape = Pattern.parse(pattern)
    score = make_score(blocks * shape.rows, groups * shape.m, seed, ties)
    order = find_permutation(score, shape, group)
    assert order.dtype == torch.int64
    assert is_permutation(order)
    before, after = kept_score(score, shape), kept_score(score[:, order], shape)
    assert after >= before * (1 - 1e-12)
    if torch.equal(order, torch.arange(len(order))):
        assert after == before
    assert torch.equal(order, find_permutation(score, shape, group))


def test_the_identity_comes_back_where_nothing_is_better() -> None:
    for score in (torch.ones(3, 8), torch.zeros(3, 8), torch.tensor([[3.0, 2.0, 1.0, 0.5] * 2])):
        assert torch.equal(find_permutation(score, TWO_OF_FOUR), torch.arange(8))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 40])
def test_two_groups_come_within_five_percent_of_the_best(rows: int) -> None:
    others = list(combinations(range(1, 8), 3))
    assert len(others) == 35  # all ways to part 8 channels into 2 groups
    for seed in range(60):
        score = make_score(rows, 8, seed)
        best = 0.0
        for rest in others:
            first = [0, *rest]
            order = first + [channel for channel in range(8) if channel not in first]
            best = max(best, kept_score(score[:, order], TWO_OF_FOUR))
        found = kept_score(score[:, find_permutation(score, TWO_OF_FOUR)], TWO_OF_FOUR)
        assert 0.95 * best <= found <= best * (1 + 1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8"])
def test_an_exchange_is_the_best_of_all(pattern: str) -> None:
    shape = Pattern.parse(pattern)
    for seed in range(5):
        score = make_score(6, 4 * shape.m, seed)
        order = torch.arange(4 * shape.m).view(4, -1)
        best = 0.0
        for exchange in permutations(range(4)):
            trial = order.clone()
            trial[:, 0] = order[list(exchange), 0]
            best = max(best, kept_score(score[:, trial.flatten()], shape))
        found = _exchanged(score.t().contiguous(), order, shape.n)
        assert torch.equal(found[:, :-1], order[:, 1:])
        assert is_permutation(found.flatten())
        kept = kept_score(score[:, found.flatten()], shape)
        assert kept == pytest.approx(best, rel=1e-6)


def test_channels_that_crowd_one_another_out_are_parted() -> None:
    # Every second group holds all that matters: in order 2:4 keeps half of it, spread out all.
    score = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0] * 8).repeat(5, 1)
    order = find_permutation(score, TWO_OF_FOUR)
    assert kept_score(score, TWO_OF_FOUR) == score.sum() / 2
    assert kept_score(score[:, order], TWO_OF_FOUR) == score.sum()


def test_smaller_assignments_keep_most_of_the_gain() -> None:
    score = make_score(64, 512, 0)
    before = kept_score(score, TWO_OF_FOUR)
    whole = kept_score(score[:, find_permutation(score, TWO_OF_FOUR)], TWO_OF_FOUR)
    parts = kept_score(score[:, find_permutation(score, TWO_OF_FOUR, 128)], TWO_OF_FOUR)
    assert whole > parts > before + 0.9 * (whole - before)


@pytest.mark.parametrize(
    ("shape", "pattern", "message"),
    [
        ((4, 8), "50%", "makes no difference to '50%'"),
        ((4, 8), "dense", "makes no difference to 'dense'"),
        ((4, 6), "2:4", "6 inputs are not a multiple of 4"),
        ((6, 8), "2:4@4x1", "6 outputs are not a multiple of 4"),
    ],
)
def test_patterns_that_cannot_be_helped(shape: tuple[int, int], pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_permutation(torch.ones(shape), Pattern.parse(pattern))


# Heads.


@pytest.mark.parametrize("pattern", ["2:4", "2:4@4x1"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_query_heads_share_the_order_of_their_value_head(
    heads: int, kv_heads: int, pattern: str
) -> None:
    shape, size = Pattern.parse(pattern), 16
    score = make_score(24, heads * size, 3)
    shared = find_shared_permutation(score, heads, kv_heads, size, shape)
    assert shared.shape == (kv_heads, size)
    rows, columns = value_rows(shared), output_columns(shared, heads)
    assert is_permutation(rows)
    assert is_permutation(columns)
    repeats = heads // kv_heads
    for head in range(heads):
        part = columns[head * size : (head + 1) * size] - head * size
        assert torch.equal(part, shared[head // repeats])
    assert torch.equal(rows.view(kv_heads, size) - torch.arange(kv_heads)[:, None] * size, shared)
    assert kept_score(score[:, columns], shape) > kept_score(score, shape)
    # Head by head it is the search on the rows of all its query heads.
    for head in range(kv_heads):
        stacked = torch.cat(
            [
                score[:, query * size : (query + 1) * size]
                for query in range(head * repeats, (head + 1) * repeats)
            ]
        )
        alone = find_permutation(stacked, shape)
        assert kept_score(stacked[:, shared[head]], shape) == pytest.approx(
            kept_score(stacked[:, alone], shape), rel=1e-3
        )


def test_heads_that_do_not_fit_are_refused() -> None:
    score = torch.ones(4, 48)
    with pytest.raises(ValueError, match="6 inputs are not a multiple of 4"):
        find_shared_permutation(score, 8, 2, 6, TWO_OF_FOUR)
    with pytest.raises(ValueError, match="48 columns are not 5 heads of 8"):
        find_shared_permutation(score, 5, 1, 8, TWO_OF_FOUR)
    with pytest.raises(ValueError, match="48 columns are not 6 heads of 8, for 4"):
        find_shared_permutation(score, 6, 4, 8, TWO_OF_FOUR)


# What the model computes.


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_computes_the_same(kind: str) -> None:
    import transformers

    size = {
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "head_dim": 16,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**size, attention_bias=True, mlp_bias=True)
    else:
        config = transformers.Qwen2Config(**size)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for name, parameter in model.named_parameters():  # biases start as zero
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens).logits
        tensors = model.state_dict()
        for block in range(2):
            attention, mlp = f"model.layers.{block}.self_attn.", f"model.layers.{block}.mlp."
            score = tensors[f"{attention}o_proj.weight"].abs()
            shared = find_shared_permutation(score, 6, 2, 16, TWO_OF_FOUR)
            rows, columns = value_rows(shared), output_columns(shared, 6)
            values, outputs = f"{attention}v_proj", f"{attention}o_proj"
            changed = permuted_tensors(tensors, [values], outputs, rows, columns)
            assert changed.keys() >= {f"{values}.weight", f"{values}.bias", f"{outputs}.weight"}
            model.load_state_dict(changed, strict=False)
            order = find_permutation(tensors[f"{mlp}down_proj.weight"].abs(), TWO_OF_FOUR)
            producers = [f"{mlp}gate_proj", f"{mlp}up_proj"]
            changed = permuted_tensors(tensors, producers, f"{mlp}down_proj", order, order)
            assert len(changed) == (5 if kind == "llama" else 3)
            model.load_state_dict(changed, strict=False)
            for found in (rows, columns, order):
                assert not torch.equal(found, torch.arange(len(found)))
        after = model(tokens).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_only_whole_orders_are_applied() -> None:
    tensors = {"up.weight": torch.rand(8, 4), "down.weight": torch.rand(4, 8)}
    order = torch.arange(8).flip(0)
    changed = permuted_tensors(tensors, ["up"], "down", order, order)
    assert torch.equal(changed["up.weight"], tensors["up.weight"].flip(0))
    assert torch.equal(changed["down.weight"], tensors["down.weight"].flip(1))
    assert changed.keys() == tensors.keys()
    for wrong in (order[:4], torch.zeros(8, dtype=torch.int64), torch.arange(9)):
        with pytest.raises(ValueError, match="not an order of 8 channels"):
            permuted_tensors(tensors, ["up"], "down", wrong, order)
        with pytest.raises(ValueError, match="not an order of 8 channels"):
            permuted_tensors(tensors, ["up"], "down", order, wrong)
