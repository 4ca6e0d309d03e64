"""The walk against plain forward passes of the whole model, for every supported family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.architecture import ARCHITECTURES
from secateur.checkpoint import Checkpoint
from secateur.errors import ModelError
from secateur.model import Linear, StreamedModel
from secateur.statistics import PROBE_TOKENS, InputStatistics
from secateur.walk import Walk

CPU = torch.device("cpu")
SAMPLES = 3
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe"]

# Of each linear of a block, what it was given in each sample: [tokens, in].
Inputs = dict[str, list[torch.Tensor]]


def streamed(path: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(path), CPU, torch.float32)


def samples_of(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if ARCHITECTURES[family].reads == "images":
        return {"pixel_values": torch.randn(SAMPLES, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.randint(0, 258, (SAMPLES, 24), generator=generator)}


def whole_model(path: Path, family: str) -> Any:
    import transformers

    auto = transformers.AutoModelForCausalLM
    if ARCHITECTURES[family].reads == "images":
        auto = transformers.AutoModelForImageClassification
    return auto.from_pretrained(path, dtype=torch.float32).eval()


def linears_in(whole: torch.nn.Module, model: StreamedModel, index: int) -> dict[str, Linear]:
    """The linears of a block, in a whole model instead of the streamed one."""
    paths = {id(module): path for path, module in model.module.named_modules()}
    return {
        name: replace(linear, module=whole.get_submodule(paths[id(linear.module)]))
        for name, linear in model.linears(index).items()
    }


def seen_in(whole: Any, linears: dict[str, Linear], samples: dict[str, torch.Tensor]) -> Inputs:
    """Run each sample through a whole model, and keep what its linears are given."""
    calls: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls.setdefault(id(module), []).append(tuple(tensor.clone() for tensor in inputs))

    modules = {id(linear.module): linear.module for linear in linears.values()}
    handles = [module.register_forward_pre_hook(watch) for module in modules.values()]
    with torch.no_grad():
        for number in range(SAMPLES):
            whole(**{name: tensor[number : number + 1] for name, tensor in samples.items()})
        found = {
            name: [given_to(linear, *call) for call in calls[id(linear.module)]]
            for name, linear in linears.items()
        }
    for handle in handles:
        handle.remove()
    return found


def given_to(linear: Linear, states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """What a linear is given: [tokens, in]. Experts get the tokens one after the other."""
    if linear.part == "whole":
        return states.reshape(-1, states.shape[-1])
    width, given = linear.module.down_proj.shape[2], []
    for token, chosen in zip(states, routing[0], strict=True):
        for expert in chosen.tolist():
            if expert != linear.expert:
                continue
            both = linear.module.gate_up_proj[expert] @ token
            inner = linear.module.act_fn(both[:width]) * both[width:]
            given.append(inner if linear.part == "down" else token)
    return torch.stack(given) if given else torch.zeros(0, linear.shape[1])


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_blocks_see_what_they_see_in_the_whole_model(
    family: str, of_family: Callable[[str], Path]
) -> None:
    """Inputs of every linear, and outputs of every block, equal those of a normal forward."""
    model, samples = streamed(of_family(family)), samples_of(family)
    whole = whole_model(of_family(family), family)
    outputs: list[list[torch.Tensor]] = []
    for block in whole.get_submodule(model.architecture.blocks):
        outputs.append([])
        block.register_forward_hook(
            lambda _, __, out, to=outputs[-1]: to.append(out[0] if isinstance(out, tuple) else out)
        )
    walk = Walk(model, samples, frozenset({"norms", "gram"}))
    for index in range(len(model.blocks)):
        linears = linears_in(whole, model, index)
        for made in outputs:
            made.clear()
        wanted = seen_in(whole, linears, samples)
        model.load_block(index)
        statistics = walk.observe(index)
        assert statistics.keys() == linears.keys()
        for name, given in wanted.items():
            assert torch.equal(model.linears(index)[name].weight, linears[name].weight)
            own, together = statistics[name], torch.cat(given)
            squares = torch.stack([x.square().sum(0) for x in given]).mean(0)
            torch.testing.assert_close(own.square_norm, squares, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.gram, together.T @ together, rtol=1e-4, atol=1e-3)
            assert (own.sequences, own.tokens) == (SAMPLES, len(together))
        walk.advance(index)
        for number in range(SAMPLES):
            torch.testing.assert_close(walk.states[number], outputs[index][number])
        model.free_block(index)
        assert all(p.is_meta for p in model.module.parameters())


@pytest.mark.parametrize("family", EXPERTS)
def test_every_token_reaches_as_many_experts_as_the_config_says(
    family: str, of_family: Callable[[str], Path]
) -> None:
    model = streamed(of_family(family))
    samples = samples_of(family)
    walk = Walk(model, samples)
    model.load_block(0)
    statistics, linears = walk.observe(0), model.linears(0)
    for part in ("gate", "up", "down"):
        tokens = [statistics[name].tokens for name in linears if linears[name].part == part]
        assert sum(tokens) == samples["input_ids"].numel() * model.module.config.num_experts_per_tok
        assert len(set(tokens)) > 1  # nothing would be learnt from experts that all see the same


def assert_same(a: InputStatistics, b: InputStatistics) -> None:
    assert torch.equal(a.square_norm, b.square_norm)
    assert torch.equal(a.gram, b.gram)
    assert (a.sequences, a.tokens) == (b.sequences, b.tokens)


GRAM = frozenset({"norms", "gram"})


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen2_moe"])
def test_part_of_the_linears_alone_gives_the_same(
    family: str, of_family: Callable[[str], Path]
) -> None:
    """One at a time, and all but the first: whoever leads those that share an input."""
    model = streamed(of_family(family))
    walk = Walk(model, samples_of(family), GRAM)
    model.load_block(0)
    everything = walk.observe(0)
    names = list(everything)
    for subset in [names[1:], *([name] for name in names)]:
        part = walk.observe(0, subset)
        assert part.keys() == set(subset)
        for name in subset:
            assert_same(part[name], everything[name])
    assert walk.observe(0, []) == {}


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
def test_observing_and_advancing_can_be_one_pass(
    family: str, of_family: Callable[[str], Path]
) -> None:
    model = streamed(of_family(family))
    once, twice = (Walk(model, samples_of(family), GRAM) for _ in range(2))
    for index in range(len(model.blocks)):
        model.load_block(index)
        at_once, first = once.observe(index, advance=True), twice.observe(index)
        twice.advance(index)
        for name in first:
            assert_same(at_once[name], first[name])
        for number in range(SAMPLES):
            assert torch.equal(once.states[number], twice.states[number])


@pytest.mark.parametrize("family", ["gemma3_text", "bloom", "mixtral", "vit"])
def test_sequences_in_a_file_give_the_same_bits(
    family: str, of_family: Callable[[str], Path], tmp_path: Path
) -> None:
    model, file = streamed(of_family(family)), tmp_path / "states"
    kept = Walk(model, samples_of(family), GRAM)
    spilled = Walk(model, samples_of(family), GRAM, spill=file)
    for index in range(len(model.blocks)):
        model.load_block(index)
        in_memory, in_file = kept.observe(index), spilled.observe(index)
        for name in in_memory:
            assert_same(in_memory[name], in_file[name])
        kept.advance(index)
        spilled.advance(index)
        for number in range(SAMPLES):
            assert torch.equal(kept.states[number], spilled.states[number])
    assert file.stat().st_size == SAMPLES * kept.states[0].nbytes
    spilled.close()
    assert list(tmp_path.iterdir()) == []


def test_on_a_cpu_nothing_is_read_ahead(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(tiny)
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("it was read"))
    model.prefetch(1)
    monkeypatch.undo()
    model.load_block(1)
    assert not any(p.is_meta for p in model.blocks[1].parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "vit"])
def test_a_block_that_was_read_ahead_is_the_block(
    family: str, of_family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another device in name only: reading ahead is the same for all that are no CPU."""
    model, plain = streamed(of_family(family)), streamed(of_family(family))
    reads: list[str] = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda c, name: reads.append(name) or load(c, name))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    model.device = torch.device("meta")
    model.prefetch(1)
    model.prefetch(len(model.blocks))  # there is none
    model.device = CPU
    model.load_block(0)  # not the one that was read ahead
    model.load_block(1)
    names = [name for index in (0, 1) for name in model.tensor_names(index)]
    assert sorted(reads) == sorted(names)  # none of them twice
    for index in (0, 1):
        plain.load_block(index)
        wanted = dict(plain.blocks[index].named_parameters())
        for name, parameter in model.blocks[index].named_parameters():
            assert torch.equal(parameter, wanted[name]), name
    reads.clear()
    model.load_block(1)  # what was read ahead is used once
    assert sorted(reads) == sorted(model.tensor_names(1))


def test_a_changed_block_changes_what_the_next_one_sees(tiny: Path) -> None:
    tokens = torch.randint(0, 258, (2, 16), generator=torch.Generator().manual_seed(1))
    model = streamed(tiny)
    walk = Walk(model, {"input_ids": tokens})
    model.load_block(0)
    before = walk.observe(0)
    for linear in model.linears(0).values():
        linear.weight.data.mul_(0.5)
    walk.advance(0)
    model.load_block(1)
    changed = walk.observe(1)["model.layers.1.self_attn.q_proj"].square_norm

    other = Walk(model, {"input_ids": tokens})
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
    walk = Walk(model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})
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
