"""Regions of blocks, and their reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.architecture import ARCHITECTURES
from secateur.artifact import Manifest
from secateur.bits import unpack_mask
from secateur.checkpoint import Checkpoint
from secateur.model import StreamedModel
from secateur.prune import find_method, prune_model
from secateur.prune.blockwise import Settings, blockwise
from secateur.prune.method import Region
from secateur.prune.regions import RecordedRegion, record_regions
from secateur.recipe import Calibration, Prune
from secateur.walk import Walk

SAMPLES = 3
# What bears linears among the children of a block; OPT's MLP is no module of its own.
REGIONS = {family: ["self_attn", "mlp"] for family in ARCHITECTURES} | {
    "bloom": ["self_attention", "mlp"],
    "deit": ["attention", "mlp"],
    "falcon": ["self_attention", "mlp"],
    "gpt2": ["attn", "mlp"],
    "opt": ["self_attn"],
    "vit": ["attention", "mlp"],
}


class Recorded(NamedTuple):
    """The second block of a model, loaded, and its regions."""

    model: StreamedModel
    walk: Walk
    regions: list[RecordedRegion]


def started(path: Path, family: str) -> tuple[StreamedModel, Walk]:
    """A model with its second block loaded, and samples that differ in what they are there."""
    model = StreamedModel(Checkpoint(path), torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(0, 258, (SAMPLES, 20), generator=generator)}
    if model.architecture.reads == "images":
        inputs = {"pixel_values": torch.randn(SAMPLES, 3, 32, 32, generator=generator)}
    walk = Walk(model, inputs)
    model.load_block(0)
    walk.advance(0)
    model.free_block(0)
    model.load_block(1)
    return model, walk


def recorded(path: Path, family: str) -> Recorded:
    model, walk = started(path, family)
    return Recorded(model, walk, record_regions(walk, 1, list(model.linears(1))))


def seen_by(walk: Walk, module: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a part of the block gets and returns, copied before anything can change it."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(_: object, rest: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        states = rest[0] if rest else options["hidden_states"]
        output = output[0] if isinstance(output, tuple) else output
        seen.append((states.clone(), output.clone()))

    handle = module.register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad():
        for number in range(walk.samples):
            walk.run(1, walk.states[number])
    handle.remove()
    return seen


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_regions_hold_what_the_dense_parts_get_and_return(
    family: str, of_family: Callable[[str], Path]
) -> None:
    """For every sample; and computed again from its inputs, a region returns its targets."""
    model, walk, regions = recorded(of_family(family), family)
    assert [region.name for region in regions] == REGIONS[family]
    linears = model.linears(1)
    inside = [name for region in regions for name in region.linears]
    direct = {id(module) for module in model.blocks[1].children()}
    assert inside == [name for name in linears if id(linears[name].module) not in direct]
    for recorded_region in regions:
        wanted = seen_by(walk, model.blocks[1].get_submodule(recorded_region.name))
        region = recorded_region.open({})
        assert (region.name, region.weights) == (recorded_region.name, [])
        assert len(region.inputs) == len(region.targets) == len(wanted) == SAMPLES
        for number, (given, returned) in enumerate(wanted):
            assert torch.equal(region.inputs[number], given)
            assert torch.equal(region.targets[number], returned)
            assert torch.equal(made_by(region, number), returned)


def test_only_parts_with_linears_that_count_are_regions(of_family: Callable[[str], Path]) -> None:
    _, walk = started(of_family("llama"), "llama")
    name = "model.layers.1.mlp.up_proj"
    (region,) = record_regions(walk, 1, [name])
    assert (region.name, list(region.linears)) == ("mlp", [name])
    assert record_regions(walk, 1, []) == []


def random_masks(region: RecordedRegion) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(linear.shape, generator=generator) > 0.4
        for name, linear in region.linears.items()
    }


def made_by(region: Region, number: int) -> torch.Tensor:
    """What a region makes of a sample now."""
    with torch.no_grad():
        return region.forward(number)


def error_of(region: Region) -> float:
    lost = power = 0.0
    for number in range(len(region.inputs)):
        target = region.targets[number].double()
        lost += float((made_by(region, number) - target).square().sum())
        power += float(target.square().sum())
    return lost / power


@pytest.mark.parametrize("number", [0, 1], ids=["attention", "mlp"])
@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt2", "llama", "qwen2_moe", "vit"])
def test_reconstruction_lowers_the_error_and_changes_nothing_else(
    family: str, number: int, of_family: Callable[[str], Path]
) -> None:
    model, _, regions = recorded(of_family(family), family)
    dense = {name: p.clone() for name, p in model.blocks[1].named_parameters()}
    recorded_region = regions[number]
    masks = random_masks(recorded_region)
    for name, mask in masks.items():
        recorded_region.linears[name].weight.masked_fill_(~mask, 0)
    region = recorded_region.open(masks)
    pruned = {name: p.clone() for name, p in model.blocks[1].named_parameters()}
    before = error_of(region)
    assert before > 1e-3
    facts = blockwise(region, Settings())
    assert facts == {
        "region": recorded_region.name,
        "error_before": pytest.approx(before, rel=1e-5),
        "error_after": pytest.approx(error_of(region), rel=1e-5),
        "kept_before": False,
    }
    assert facts["error_after"] < 0.95 * before
    for name, mask in masks.items():
        weight = recorded_region.linears[name].weight
        assert torch.equal(weight != 0, mask)
        assert not torch.signbit(weight[~mask]).any()
    own = {id(weight) for weight, _ in region.weights}
    for name, parameter in model.blocks[1].named_parameters():
        changed = not torch.equal(parameter, pruned[name])
        assert changed == (id(parameter) in own), name
        if id(parameter) not in own:
            assert torch.equal(parameter, dense[name])
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_more_epochs_lower_it_further(of_family: Callable[[str], Path]) -> None:
    errors = []
    for epochs in (1, 4, 16):
        _, _, regions = recorded(of_family("llama"), "llama")
        masks = random_masks(regions[1])
        for name, mask in masks.items():
            regions[1].linears[name].weight.masked_fill_(~mask, 0)
        errors.append(blockwise(regions[1].open(masks), Settings(epochs=epochs))["error_after"])
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.9 * errors[0]


def test_steps_are_relative_to_the_size_of_the_weights(of_family: Callable[[str], Path]) -> None:
    """A thousand times larger, the output projection and what it is to put out: the same errors."""
    errors = []
    for factor in (1.0, 1000.0):
        _, _, regions = recorded(of_family("llama"), "llama")
        name = "model.layers.1.self_attn.o_proj"
        mask = random_masks(regions[0])[name]
        regions[0].linears[name].weight.masked_fill_(~mask, 0).mul_(factor)
        region = regions[0].open({name: mask})
        for number in range(SAMPLES):
            region.targets[number] = factor * region.targets[number]
        errors.append(blockwise(region, Settings()))
    assert errors[0]["error_after"] < 0.95 * errors[0]["error_before"]
    for key in ("error_before", "error_after"):
        assert errors[1][key] == pytest.approx(errors[0][key], rel=1e-3)


@pytest.mark.parametrize("rate", [50.0, 1e30])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_what_does_not_improve_stays_as_it_was(
    family: str, rate: float, of_family: Callable[[str], Path]
) -> None:
    """With steps so large that the error grows, or is no number any more."""
    model, _, regions = recorded(of_family(family), family)
    for recorded_region in regions:
        masks = random_masks(recorded_region)
        for name, mask in masks.items():
            recorded_region.linears[name].weight.masked_fill_(~mask, 0)
        region = recorded_region.open(masks)
        before = {name: p.clone() for name, p in model.blocks[1].named_parameters()}
        facts = blockwise(region, Settings(rate=rate))
        assert facts["kept_before"] is True
        assert facts["error_after"] == facts["error_before"] == pytest.approx(error_of(region))
        for name, parameter in model.blocks[1].named_parameters():
            assert torch.equal(parameter, before[name]), name
            assert not parameter.requires_grad


def test_a_region_that_lost_nothing_is_left_alone(of_family: Callable[[str], Path]) -> None:
    _, _, regions = recorded(of_family("llama"), "llama")
    masks = {n: torch.ones(linear.shape) > 0 for n, linear in regions[0].linears.items()}
    facts = blockwise(regions[0].open(masks), Settings())
    assert facts == {
        "region": "self_attn",
        "error_before": 0.0,
        "error_after": 0.0,
        "kept_before": True,
    }


def pruned(model: Path, out: Path, text: Path, method: str, **settings: Any) -> Manifest:
    recipe = Prune.model_validate({"method": method, "pattern": "2:4", **settings})
    calibration = Calibration(data=str(text), samples=SAMPLES, length=20)
    return prune_model(str(model), out, recipe, calibration, quiet=True).manifest


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {name: checkpoint.load(name) for name in checkpoint.names()}


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "opt"])
def test_a_chain_keeps_the_masks_and_lowers_the_errors(
    family: str, of_family: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Of the first block; the second one's inputs, and so its masks, depend on the first."""
    path = of_family(family)
    plain = pruned(path, tmp_path / "plain", text_file, "wanda")
    chain = pruned(path, tmp_path / "chain", text_file, "wanda+blockwise")
    masks, same = (load_file(tmp_path / n / "masks.safetensors") for n in ("plain", "chain"))
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "chain")
    assert masks.keys() == same.keys()
    for name, facts in chain.layers.items():
        key = f"{name}.weight"
        if ".fc" in name:
            assert "blockwise" not in facts.steps
            continue
        step = facts.steps["blockwise"]
        assert step["region"] in REGIONS[family]
        assert step["error_after"] < step["error_before"]
        assert step["kept_before"] is False
        kept = unpack_mask(same[key], facts.shape[1])
        new = after[key].T if facts.transposed else after[key]
        assert torch.equal(new != 0, kept)
        assert 0 < facts.relative_error < 2
        if f"{REGIONS[family][0]}." in key and "0" in key.split("."):
            assert torch.equal(masks[key], same[key])
            assert not torch.equal(before[key], after[key])
        assert facts.relative_error != plain.layers[name].relative_error
    for name in after:
        if name not in same:
            assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_region_errors_of_the_manifest_are_those_of_what_was_written(
    family: str, of_family: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """With the weights of the first block as they are on the disk, on the calibration inputs."""
    from secateur.calibration import calibration_inputs

    path = of_family(family)
    layers = pruned(path, tmp_path / "out", text_file, "wanda+blockwise").layers
    model = StreamedModel(Checkpoint(path), torch.device("cpu"), torch.float32)
    calibration = Calibration(data=str(text_file), samples=SAMPLES, length=20)
    walk = Walk(model, calibration_inputs(model, calibration))
    model.load_block(0)
    names = list(model.linears(0))
    regions = record_regions(walk, 0, names)
    model.load_block(0, Checkpoint(tmp_path / "out").load)
    for recorded_region in regions:
        facts = layers[next(iter(recorded_region.linears))].steps["blockwise"]
        assert facts["region"] == recorded_region.name
        assert facts["error_after"] == pytest.approx(error_of(recorded_region.open({})), rel=1e-4)


def test_linears_that_a_rule_keeps_dense_stay_so_inside_fused_experts(
    of_family: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Gate and up share a tensor: a mask for one of them must not touch the other."""
    path = of_family("mixtral")
    rules = [{"match": "*.w1", "pattern": "dense"}]
    layers = pruned(path, tmp_path / "out", text_file, "wanda+blockwise", layers=rules).layers
    before, after = tensors_of(path), tensors_of(tmp_path / "out")
    assert sum(name.endswith("w1") for name in layers) == 8
    for name, facts in layers.items():
        if name.endswith("w1"):
            assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
        else:
            step = facts.steps["blockwise"]
            assert not step["kept_before"], name
            assert step["error_after"] < step["error_before"]


def test_half_precision_is_what_the_next_block_sees(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """What is written is rounded; rounding it again changes nothing, and zeros stay zeros."""
    model = make_model(tmp_path / "model")
    halves = {n: t.bfloat16() for n, t in load_file(model / "model.safetensors").items()}
    save_file(halves, model / "model.safetensors", metadata={"format": "pt"})
    layers = pruned(model, tmp_path / "out", text_file, "wanda+blockwise").layers
    after, masks = tensors_of(tmp_path / "out"), load_file(tmp_path / "out" / "masks.safetensors")
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        if name in masks:
            kept = unpack_mask(masks[name], tensor.shape[1])
            assert torch.equal(tensor != 0, kept)
            assert not torch.equal(tensor[kept], halves[name][kept])
    assert len(layers) == 14


@pytest.mark.parametrize("method", ["wanda+blockwise", "wandapp", "wandapp+blockwise"])
def test_a_single_layer_has_no_regions(
    method: str, secateur_command: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "layer.safetensors"
    save_file({"weight": torch.ones(4, 8), "activations": torch.ones(1, 2, 8)}, source)
    ran = secateur_command("layer", source, "--method", method)
    assert ran.returncode == 2
    assert "needs a whole decoder block" in ran.stderr
    assert "leave out +blockwise" in ran.stderr


def test_blockwise_reads_inputs_whatever_it_refines() -> None:
    assert find_method("magnitude+blockwise").needs_text
    assert find_method("wanda+lsq+blockwise").needs == {"norms", "gram"}
