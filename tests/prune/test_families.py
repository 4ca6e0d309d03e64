"""`prune_model` on every supported family: what it changes, and that nothing else does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
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
from secateur.pattern import Pattern
from secateur.prune import prune_model
from secateur.prune.masks import keep_highest
from secateur.recipe import Calibration, Prune

SOME = ["bloom", "falcon", "gemma3_text", "gpt2", "mixtral", "opt", "phi3", "qwen2_moe", "vit"]
CASES = [(family, "wanda", "2:4") for family in sorted(ARCHITECTURES)]
CASES += [(f, *how) for f in SOME for how in (("gblm", "2:4"), ("sparsegpt", "50%"))]
# Matrices in blocks that are no linears, or route tokens: they stay as they are.
LEFT = re.compile(r"\.(mlp|block_sparse_moe)\.(gate|shared_expert_gate)\.weight$")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise, as images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


def is_image(family: str) -> bool:
    return ARCHITECTURES[family].reads == "images"


class Pruned(NamedTuple):
    """A model before and after.

    Attributes:
        masks: True = kept, [out, in], by name of the linear.
    """

    family: str
    method: str
    pattern: str
    dense: Path
    out: Path
    manifest: Manifest
    masks: dict[str, torch.Tensor]


def pruned(
    family: str, dense: Path, out: Path, data: Path, method: str = "wanda", pattern: str = "2:4"
) -> Pruned:
    recipe = Prune(method=method, pattern=Pattern.parse(pattern))
    calibration = Calibration(data=str(data), samples=3, length=24)
    manifest = prune_model(str(dense), out, recipe, calibration, quiet=True).manifest
    masks = {}
    for key, bits in load_file(out / "masks.safetensors").items():
        name = key.removesuffix(".weight")
        masks[name] = unpack_mask(bits, manifest.layers[name].shape[1])
    return Pruned(family, method, pattern, dense, out, manifest, masks)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    of_family: Callable[[str], Path],
    text_file: Path,
    images: Path,
) -> Pruned:
    family, method, pattern = request.param
    out, data = tmp_path_factory.mktemp("pruned") / "out", images if is_image(family) else text_file
    return pruned(family, of_family(family), out, data, method, pattern)


def test_zeros_are_where_the_masks_say_and_nowhere_else(case: Pruned) -> None:
    before, after = Checkpoint(case.dense), Checkpoint(case.out)
    for name, mask in case.masks.items():
        facts = case.manifest.layers[name]
        old, new = before.load(f"{name}.weight"), after.load(f"{name}.weight")
        assert facts.transposed == (case.family == "gpt2")
        if facts.transposed:
            old, new = old.T, new.T
        assert tuple(new.shape) == tuple(mask.shape) == facts.shape
        Pattern.parse(case.pattern).check(mask)
        assert torch.equal(new != 0, mask)
        assert facts.sparsity == 0.5 == 1 - mask.double().mean()
        assert facts.relative_error is not None
        assert 0 < facts.relative_error < 1
        if case.method != "sparsegpt":
            assert torch.equal(new[mask], old[mask])


def test_every_matrix_of_a_block_is_pruned_and_nothing_else_is_touched(case: Pruned) -> None:
    before, after = Checkpoint(case.dense), Checkpoint(case.out)
    assert before.names() == after.names()
    inside = re.compile(r"\.\d+\.")
    routers = 0
    for name in before.names():
        if inside.search(name) and len(before.shape(name)) == 2 and not LEFT.search(name):
            assert name.removesuffix(".weight") in case.masks
            continue
        assert name.removesuffix(".weight") not in case.masks
        assert before.dtype(name) == after.dtype(name)
        assert torch.equal(before.load(name), after.load(name)), name
        routers += bool(LEFT.search(name))
    assert routers == {"mixtral": 2, "qwen2_moe": 4, "qwen3_moe": 2}.get(case.family, 0)


def opened(family: str, path: Path) -> Any:
    import transformers

    auto = transformers.AutoModelForCausalLM
    if is_image(family):
        auto = transformers.AutoModelForImageClassification
    return auto.from_pretrained(path, dtype=torch.float32).eval()


def logits_of(family: str, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if is_image(family):
            return model(pixel_values=torch.randn(2, 3, 32, 32, generator=generator)).logits
        return model(torch.randint(0, 258, (2, 16), generator=generator)).logits


def masked(case: Pruned) -> Any:
    """The dense model of transformers, its modules' weights multiplied by the masks."""
    whole = opened(case.family, case.dense)
    streamed = StreamedModel(Checkpoint(case.dense), torch.device("cpu"), torch.float32)
    paths = {id(module): path for path, module in streamed.module.named_modules()}
    for index in range(len(streamed.blocks)):
        for name, linear in streamed.linears(index).items():
            if name in case.masks:
                own = replace(linear, module=whole.get_submodule(paths[id(linear.module)]))
                own.weight.mul_(case.masks[name])
    return whole


def test_transformers_computes_with_it_what_the_masks_make_of_the_dense_model(
    case: Pruned,
) -> None:
    found = logits_of(case.family, opened(case.family, case.out))
    assert found.isfinite().all()
    if case.method != "sparsegpt":  # which also changes the weights that it keeps
        assert torch.equal(found, logits_of(case.family, masked(case)))


@pytest.mark.parametrize("method", ["wanda", "gblm", "sparsegpt", "wandapp+blockwise"])
def test_an_expert_that_sees_no_token_is_pruned_by_magnitude(
    method: str, tmp_path: Path, make_model: Callable[..., Path], text_file: Path
) -> None:
    model = make_model(tmp_path / "model", "mixtral", num_experts_per_tok=1)
    weights = load_file(model / "model.safetensors")
    for block in range(2):
        gate = weights[f"model.layers.{block}.block_sparse_moe.gate.weight"]
        gate[2] = gate[[0, 1, 3]].mean(dim=0)  # the mean of the others is never the largest
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    case = pruned("mixtral", model, tmp_path / "out", text_file, method)
    layers, tokens = case.manifest.layers, [0, 0]
    unseen = [name for name in layers if ".experts.2." in name]
    for name in [name for name in layers if ".experts." in name]:
        facts = layers[name].steps["magnitude" if name in unseen else method]
        assert (facts["tokens"] == 0) == (name in unseen)
        tokens["layers.1." in name] += facts["tokens"] * name.endswith("w1")
    assert tokens == [3 * 24] * 2
    for name in unseen:
        facts = layers[name]
        assert facts.steps["magnitude"]["because"] == "no calibration token was routed to it"
        assert facts.relative_error is None
        weight = weights[f"{name}.weight"]
        by_size = keep_highest(weight.abs(), Pattern.parse("2:4"), among="row")
        assert torch.equal(case.masks[name], by_size)
        assert torch.equal(Checkpoint(case.out).load(f"{name}.weight"), weight * by_size)
    (note,) = case.manifest.notes
    assert note.startswith("6 layers pruned by magnitude, as no calibration token")
    assert note.endswith(f"{', '.join(unseen[:3])} and 3 more")


@pytest.mark.parametrize("method", ["wanda", "gblm"])
def test_a_gpt2_that_was_saved_without_its_head(
    method: str, tmp_path: Path, of_family: Callable[[str], Path], text_file: Path
) -> None:
    """Names without ``transformer.``, as in the first GPT-2 on the hub, and its old buffers."""
    import shutil

    rooted, bare = of_family("gpt2"), tmp_path / "bare"
    shutil.copytree(rooted, bare)
    weights = load_file(rooted / "model.safetensors")
    assert all(name.startswith("transformer.") for name in weights)
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    renamed["h.1.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(renamed, bare / "model.safetensors", metadata={"format": "pt"})
    one = pruned("gpt2", rooted, tmp_path / "rooted-out", text_file, method)
    two = pruned("gpt2", bare, tmp_path / "bare-out", text_file, method)
    assert Checkpoint(bare).names() == Checkpoint(two.out).names()
    assert len(two.masks) == len(one.masks) == 8
    for name, mask in two.masks.items():
        assert torch.equal(mask, one.masks[f"transformer.{name}"])
        assert torch.equal(Checkpoint(two.out).load(f"{name}.weight").T != 0, mask)
    assert torch.equal(Checkpoint(two.out).load("h.1.attn.bias"), renamed["h.1.attn.bias"])
    found = logits_of("gpt2", opened("gpt2", two.out))
    assert torch.equal(found, logits_of("gpt2", opened("gpt2", one.out)))
