"""Streamed gradients against autograd on the whole model, and the methods that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.architecture import ARCHITECTURES
from secateur.bits import unpack_mask
from secateur.calibration import calibration_inputs
from secateur.checkpoint import Checkpoint
from secateur.gradients import gradient_file, regional_gradients, stream_gradients
from secateur.model import Linear, StreamedModel
from secateur.prune import prune_model
from secateur.recipe import Calibration, Prune
from secateur.walk import Walk

SAMPLES = 3
# Soft caps and two kinds of attention, Conv1D and a tied head, blocks that return tuples, experts
# of both kinds, a decoder inside a decoder, labels.
FAMILIES = ["bloom", "falcon", "gemma2", "gpt2", "llama", "mixtral", "opt", "qwen2_moe", "vit"]
NORMS = {
    "l1": lambda gradients: gradients.abs().sum(dim=0),
    "l2": lambda gradients: gradients.square().sum(dim=0).sqrt(),
}

# By name of a linear, one gradient or input for each sample.
ByName = dict[str, list[torch.Tensor]]


def streamed(path: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(path), torch.device("cpu"), torch.float32)


def samples_of(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if ARCHITECTURES[family].reads == "images":
        pixels = torch.randn(SAMPLES, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([4, 0, 2])}
    return {"input_ids": torch.randint(0, 258, (SAMPLES, 20), generator=generator)}


class Whole:
    """A whole model of transformers, with the linears of its blocks by name."""

    def __init__(self, path: Path, family: str) -> None:
        import transformers

        auto = transformers.AutoModelForCausalLM
        if ARCHITECTURES[family].reads == "images":
            auto = transformers.AutoModelForImageClassification
        self.module: Any = auto.from_pretrained(path, dtype=torch.float32).eval()
        model = streamed(path)
        paths = {id(module): path for path, module in model.module.named_modules()}
        self.blocks: Any = self.module.get_submodule(model.architecture.blocks)
        self.linears: list[dict[str, Linear]] = [
            {
                name: replace(linear, module=self.module.get_submodule(paths[id(linear.module)]))
                for name, linear in model.linears(index).items()
            }
            for index in range(len(model.blocks))
        ]

    def every_linear(self) -> dict[str, Linear]:
        return {name: linear for own in self.linears for name, linear in own.items()}

    def losses(self, samples: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        """The loss of each sample, by transformers' own code."""
        for number in range(len(next(iter(samples.values())))):
            sample = {name: tensor[number : number + 1] for name, tensor in samples.items()}
            yield self.module(**{"labels": sample.get("input_ids"), **sample}).loss

    def norms_of_blocks(
        self, samples: dict[str, torch.Tensor], index: int
    ) -> Iterator[torch.Tensor]:
        """For each sample the norm of what a block puts out."""
        out: list[torch.Tensor] = []
        hook = self.blocks[index].register_forward_hook(
            lambda _, __, output: out.append(output[0] if isinstance(output, tuple) else output)
        )
        for _ in self.losses(samples):
            yield out.pop().square().sum().sqrt()
        hook.remove()


def differentiated(whole: Whole, values: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Autograd's gradients of each value with respect to every linear: [values, out, in]."""
    linears = whole.every_linear()
    found: ByName = {name: [] for name in linears}
    for value in values:
        whole.module.zero_grad()
        value.backward()
        for name, linear in linears.items():
            gradient = linear.gradient
            found[name].append(torch.zeros(linear.shape) if gradient is None else gradient.clone())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def assert_near(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert found.shape == wanted.shape, name
    assert (found - wanted).norm() <= 1e-5 * wanted.norm(), name


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All gradient files of a two-block model, of a directory that holds nothing else."""
    files = [gradient_file(directory, block) for block in range(2)]
    assert sorted(directory.iterdir()) == files
    return load_file(files[0]) | load_file(files[1])


@pytest.fixture(scope="module")
def autograd(of_family: Callable[[str], Path]) -> Callable[[str], dict[str, torch.Tensor]]:
    """Gradients of the loss of each sample, from the whole model; each family's computed once."""
    made: dict[str, dict[str, torch.Tensor]] = {}

    def get(family: str) -> dict[str, torch.Tensor]:
        if family not in made:
            whole = Whole(of_family(family), family)
            made[family] = differentiated(whole, whole.losses(samples_of(family)))
        return made[family]

    return get


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_gradients_are_those_of_the_whole_model(
    family: str,
    norm: Any,
    of_family: Callable[[str], Path],
    autograd: Callable[[str], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    model = streamed(of_family(family))
    done: list[tuple[int, int]] = []
    stream_gradients(model, samples_of(family), norm, tmp_path, tick=lambda *at: done.append(at))
    found, wanted = read(tmp_path), autograd(family)
    assert found.keys() == wanted.keys()
    for name, gradients in wanted.items():
        assert_near(found[name], NORMS[norm](gradients), name)
    assert all(p.is_meta and not p.requires_grad for p in model.module.parameters())
    assert done == sorted(done)
    assert done[-1] == (6, 6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_half_precision_as_in_the_authors_code(
    norm: Any,
    of_family: Callable[[str], Path],
    autograd: Callable[[str], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    stream_gradients(streamed(of_family("llama")), samples_of("llama"), norm, tmp_path, half=True)
    for name, gradients in autograd("llama").items():
        wanted = NORMS[norm](100 * gradients)
        found = read(tmp_path)[name]
        assert torch.equal(found, found.half().float())
        torch.testing.assert_close(found, wanted, rtol=4e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "gpt2", "mixtral", "vit"])
def test_spilled_states_give_the_same_bits(
    family: str, of_family: Callable[[str], Path], tmp_path: Path
) -> None:
    directories = [tmp_path / "memory", tmp_path / "files"]
    for directory in directories:
        directory.mkdir()
        spill = directory.name == "files"
        model = streamed(of_family(family))
        stream_gradients(model, samples_of(family), "l2", directory, spill=spill)
    kept, spilled = map(read, directories)
    assert all(torch.equal(spilled[name], norms) for name, norms in kept.items())


@pytest.mark.parametrize("spill", [False, True])
def test_taken_up_again_after_some_blocks(
    spill: bool, of_family: Callable[[str], Path], tmp_path: Path
) -> None:
    """The last block's gradients are written first; what is there is not written again."""
    model, samples = streamed(of_family("llama")), samples_of("llama")
    stream_gradients(model, samples, "l2", tmp_path, spill=spill)
    whole = read(tmp_path)
    gradient_file(tmp_path, 0).unlink()
    marked = {name: tensor + 1 for name, tensor in load_file(gradient_file(tmp_path, 1)).items()}
    save_file(marked, gradient_file(tmp_path, 1))
    stream_gradients(streamed(of_family("llama")), samples, "l2", tmp_path, spill=spill)
    again = read(tmp_path)
    for name, norms in whole.items():
        assert torch.equal(again[name], norms + 1 if name in marked else norms)


def test_gradients_that_are_there_need_no_model(
    of_family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = streamed(of_family("llama")), samples_of("llama")
    stream_gradients(model, samples, "l2", tmp_path)
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("it was read"))
    stream_gradients(model, samples, "l2", tmp_path)


@pytest.mark.parametrize("family", ["bloom", "gemma2", "gpt2", "mixtral", "vit"])
def test_regional_gradients_are_those_of_the_norm_of_the_blocks_output(
    family: str, of_family: Callable[[str], Path]
) -> None:
    samples = samples_of(family)
    model, whole = streamed(of_family(family)), Whole(of_family(family), family)
    features = {name: tensor for name, tensor in samples.items() if name != "labels"}
    walk = Walk(model, features)
    for index in range(2):
        model.load_block(index)
        found = regional_gradients(walk, index)
        wanted = differentiated(whole, whole.norms_of_blocks(samples, index))
        assert found.keys() == whole.linears[index].keys()
        for name, gradients in found.items():
            assert (gradients.norm, gradients.samples, gradients.scale) == ("l2", SAMPLES, 1.0)
            assert_near(gradients.norms, NORMS["l2"](wanted[name]), name)
        assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())
        walk.advance(index)


@contextmanager
def watched(whole: Whole, index: int) -> Iterator[ByName]:
    """What the linears of a block are given in each sample that is run: [tokens, in]."""
    seen: ByName = {name: [] for name in whole.linears[index]}

    def watch(linears: list[tuple[str, Linear]]) -> Callable[..., None]:
        def hook(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            for name, linear in linears:
                seen[name].append(given_to(linear, *inputs).detach())

        return hook

    handles = []
    for module in {linear.module for linear in whole.linears[index].values()}:
        own = [(n, linear) for n, linear in whole.linears[index].items() if linear.module is module]
        handles.append(module.register_forward_pre_hook(watch(own)))
    yield seen
    for handle in handles:
        handle.remove()


def given_to(linear: Linear, states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    if linear.part == "whole":
        return states.reshape(-1, states.shape[-1])
    mine = states[(routing[0] == linear.expert).sum(dim=1) > 0]
    if linear.part != "down":
        return mine
    width = linear.module.down_proj.shape[2]
    both = mine @ linear.module.gate_up_proj[linear.expert].T
    return linear.module.act_fn(both[:, :width]) * both[:, width:]


def assert_keeps_highest(score: torch.Tensor, mask: torch.Tensor, name: str) -> None:
    """Of every four the two with the highest scores; ties, within rounding, either way."""
    score, mask = score.reshape(-1, 4), mask.reshape(-1, 4)
    assert (mask.sum(dim=1) == 2).all(), name
    lowest_kept = score.where(mask, score.new_tensor(torch.inf)).amin(dim=1)
    highest_removed = score.where(~mask, score.new_zeros(())).amax(dim=1)
    assert (lowest_kept >= highest_removed * (1 - 1e-4)).all(), name


# Method, its settings, and what it makes of the samples' gradients.
TERMS: list[tuple[str, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
    ("gblm", {"gblm.alpha": 10}, NORMS["l2"]),
    ("gblm", {"gblm.alpha": 10, "gblm.norm": "l1"}, NORMS["l1"]),
    ("wandapp", {"wandapp.alpha": 10}, lambda each: each.square().mean(dim=0).sqrt()),
]


@pytest.mark.parametrize(("method", "settings", "term"), TERMS, ids=["l2", "l1", "wandapp"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_masks_are_those_of_the_formula(
    family: str,
    method: str,
    settings: dict[str, Any],
    term: Callable[[torch.Tensor], torch.Tensor],
    of_family: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    """By hand: a whole model, pruned block by block, with autograd's gradients.

    GBLM's gradients are the dense model's, Wanda++'s those of a block behind pruned ones.
    """
    path, calibration = of_family(family), Calibration(data=str(text_file), samples=3, length=20)
    recipe = Prune(method=method, settings=settings)
    prune_model(str(path), tmp_path / "out", recipe, calibration, quiet=True)
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    samples = calibration_inputs(streamed(path), calibration)
    whole = Whole(path, family)
    gradients = differentiated(whole, whole.losses(samples)) if method == "gblm" else {}
    other = torch.zeros(2)  # groups in which one of the two terms alone would choose otherwise
    for index, linears in enumerate(whole.linears):
        with watched(whole, index) as seen:
            if method == "wandapp":
                gradients = differentiated(whole, whole.norms_of_blocks(samples, index))
            else:
                list(whole.losses(samples))
        for name, linear in linears.items():
            squares = torch.stack([x.square().sum(dim=0) for x in seen[name]]).mean(dim=0)
            mask = unpack_mask(masks[f"{name}.weight"], linear.shape[1])
            terms = [each * linear.weight.abs() for each in (squares.sqrt(), term(gradients[name]))]
            assert_keeps_highest(terms[0] + 10 * terms[1], mask, name)
            for number, alone in enumerate(terms):
                best = alone.reshape(-1, 4).argsort(dim=1)[:, 2:]
                other[number] += (~mask.reshape(-1, 4).gather(1, best).all(dim=1)).sum()
        for name, linear in linears.items():
            linear.weight.mul_(unpack_mask(masks[f"{name}.weight"], linear.shape[1]))
    assert (other > 20).all()
