"""The walk against plain forward passes of the whole model, for every supported family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secateur.checkpoint import Checkpoint
from secateur.errors import ModelError
from secateur.model import ARCHITECTURES, StreamedModel, load_causal_lm
from secateur.statistics import PROBE_TOKENS, InputStatistics
from secateur.walk import Walk

CPU = torch.device("cpu")


def streamed(path: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(path), CPU, torch.float32)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_blocks_see_what_they_see_in_the_whole_model(
    family: str, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """Inputs of every linear, and outputs of every block, equal those of a normal forward."""
    path = make_model(tmp_path / family, family)
    tokens = torch.randint(0, 258, (3, 24), generator=torch.Generator().manual_seed(1))
    whole = load_causal_lm(path, torch.float32)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0][0])

    model = streamed(path)
    names = [name for index in range(len(model.blocks)) for name in model.linears(index)]
    assert len(names) == 14
    for name in names:
        whole.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for row in tokens:
            whole(row[None])

    walk = Walk(model, tokens)
    for index in range(len(model.blocks)):
        model.load_block(index)
        statistics = walk.observe(index)
        for name in model.linears(index):
            squares = torch.stack([x.square().sum(0) for x in seen[name]]).mean(0)
            torch.testing.assert_close(statistics[name].square_norm, squares)
            assert statistics[name].tokens == 3 * 24
        walk.advance(index)
        model.free_block(index)
        assert all(p.is_meta for p in model.blocks[index].parameters())


def test_a_changed_block_changes_what_the_next_one_sees(tiny: Path) -> None:
    tokens = torch.randint(0, 258, (2, 16), generator=torch.Generator().manual_seed(1))
    model = streamed(tiny)
    walk = Walk(model, tokens)
    model.load_block(0)
    before = walk.observe(0)
    for linear in model.linears(0).values():
        linear.weight.data.mul_(0.5)
    walk.advance(0)
    model.load_block(1)
    changed = walk.observe(1)["model.layers.1.self_attn.q_proj"].square_norm

    other = Walk(model, tokens)
    model.load_block(0)
    again = other.observe(0)
    for name, statistics in before.items():
        assert torch.equal(statistics.square_norm, again[name].square_norm)
    other.advance(0)
    model.load_block(1)
    same = other.observe(1)["model.layers.1.self_attn.q_proj"].square_norm
    assert not torch.allclose(changed, same)


def test_linears_that_share_an_input_share_its_statistics(tiny: Path) -> None:
    model = streamed(tiny)
    walk = Walk(model, torch.zeros(1, 8, dtype=torch.int64))
    model.load_block(0)
    statistics = walk.observe(0)
    attention = "model.layers.0.self_attn."
    assert statistics[attention + "q_proj"] is statistics[attention + "v_proj"]
    assert statistics[attention + "q_proj"] is not statistics[attention + "o_proj"]


def test_relative_error_is_exact_on_few_tokens_and_near_on_many() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 10, generator=generator)
    after = before * (torch.rand(6, 10, generator=generator) > 0.5)
    for tokens, tolerance in ((64, 1e-5), (8192, 0.05)):
        inputs = torch.randn(2, tokens, 10, generator=generator)
        statistics = InputStatistics(10, 2, CPU)
        for sequence in inputs:
            statistics.update(sequence[None])
        flat = inputs.reshape(-1, 10)
        lost = ((before - after) @ flat.T).square().sum()
        exact = float(lost / (before @ flat.T).square().sum())
        assert statistics.relative_error(before, after) == pytest.approx(exact, rel=tolerance)
    assert tokens * 2 > PROBE_TOKENS
    assert statistics.relative_error(torch.zeros(6, 10), torch.zeros(6, 10)) == 0.0


def test_weights_that_do_not_fit_the_config(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    path = make_model(tmp_path / "m")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 64'))
    model = streamed(path)
    with pytest.raises(ModelError, match="config"):
        model.load_block(0)


def test_unsupported_architectures_and_compressed_models(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    path = make_model(tmp_path / "m")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"llama"', '"perceptron"'))
    with pytest.raises(ModelError, match=r"'perceptron' is not supported \(supported: .*llama"):
        streamed(path)
    (path / "config.json").write_text(
        config.replace('"vocab_size"', '"quantization_config": {"quant_method": "x"}, "vocab_size"')
    )
    with pytest.raises(ModelError, match="already compressed"):
        streamed(path)
