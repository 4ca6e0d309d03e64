"""pack_model with int8 and int4: the whole way on tiny models, and what the files hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur.compile.calibrate as calibrate
from secateur.artifact import Manifest
from secateur.checkpoint import Checkpoint
from secateur.compile import pack_model, read_packed, write_dense
from secateur.compile.calibrate import usual_text
from secateur.compile.quantize import activation_error, rtn
from secateur.errors import ModelError, UsageError
from secateur.recipe import Calibration
from tests.compile.conftest import prune_by_hand, rewrite

LIMIT = {"int8": 127, "int4": 7}
DENSE = "model.layers.0.self_attn.k_proj"
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Six sequences of ids of the tiny models' vocabulary."""
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    made = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(3, 64, (6, 48), generator=made)}, file)
    return Calibration(data=str(file))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 Llama in two shards with tied embeddings and dense k_proj; 36 and 44 columns."""
    return prune_by_hand(
        tmp_path_factory.mktemp("integers") / "pruned",
        hidden=36,
        inner=44,
        tied=True,
        shard="40KB",
        dense=("k_proj",),
    )


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize(
    ("pattern", "group"), [("2:4", 32), ("50%", 64), ("50%@8x1", 128), ("2:4@4x1", 32)]
)
def test_every_pattern(
    tmp_path: Path, text: Calibration, values: Any, pattern: str, group: int
) -> None:
    pruned = prune_by_hand(tmp_path / "pruned", pattern, hidden=48, inner=80, dense=("k_proj",))
    report = pack_model(
        pruned, tmp_path / "packed", values=values, group_size=group, calibration=text, quiet=True
    )
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    before, packed = load_file(pruned / "model.safetensors"), read_packed(tmp_path / "packed")
    masks = load_file(pruned / "masks.safetensors")
    assert len(packed.layers) == 14
    for name, layer in packed.layers.items():
        pieces, dense = packed.pieces(name), name.endswith("k_proj")
        rows, columns = layer.shape
        assert (pieces.value_type, pieces.group_size) == (values, group)
        assert (str(layer.pattern), pieces.bitmask is None) == (
            ("dense", True) if dense else (pattern, False)
        )
        assert (f"{name}.weight_bitmask" in stored) != dense
        if not dense:
            assert torch.equal(stored[f"{name}.weight_bitmask"], masks[f"{name}.weight"])
        assert pieces.scales is not None
        assert pieces.scales.shape == (rows, -(-columns // group))
        integers = pieces.values.reshape(-1)
        if values == "int4":
            assert (pieces.values.dtype, pieces.values.shape) == ("uint8", (-(-layer.kept // 2),))
            halves = [half for byte in integers.tolist() for half in (byte & 15, byte >> 4)]
            integers = [half - 16 if half > 7 else half for half in halves][: layer.kept]
        else:
            assert (pieces.values.dtype, pieces.values.shape) == ("int8", layer.values_shape)
        assert max(abs(int(value)) for value in integers) <= LIMIT[values]
        mask, kept = packed.mask(name), iter(integers)
        weight = packed.load(f"{name}.weight")
        assert weight.dtype == torch.float32
        for row, column in mask.nonzero().tolist():
            scale = float(pieces.scales[row, column // group])
            assert float(weight[row, column]) == int(next(kept)) * scale
        assert not weight[~mask].any()
        assert not weight[~mask].signbit().any()
        old = before[f"{name}.weight"]
        assert float((weight - old).norm() / old.norm()) < {"int8": 0.01, "int4": 0.2}[values]
        size = sum(stored[tensor].nbytes for tensor in packed.config.stored(name))
        assert report.layers[name].packed_bytes == size
        assert packed.load(f"{name}.weight", torch.bfloat16).equal(weight.bfloat16())


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_report_and_manifest(source: Path, tmp_path: Path, text: Calibration, values: Any) -> None:
    report = pack_model(source, tmp_path / "packed", values=values, calibration=text, quiet=True)
    checkpoint, manifest = Checkpoint(tmp_path / "packed"), Manifest.read(tmp_path / "packed")
    assert [file.name for file in checkpoint.files] == [f.name for f in Checkpoint(source).files]
    assert report.packed_bytes == sum(checkpoint.nbytes(name) for name in checkpoint.names())
    assert (report.values, report.group_size, report.quantize) == (values, 64, "gptq")
    assert (report.calibration, report.calibration_tokens) == (text, 6 * 48)
    assert manifest.recipe["compile"] == {
        "format": "packed",
        "values": values,
        "group_size": 64,
        "quantize": "gptq",
        "calibration": text.model_dump(),
    }
    assert not (tmp_path / "packed" / "quantised").exists()
    quantization = checkpoint.config["quantization_config"]
    assert {key: quantization[key] for key in quantization if key != "layers"} == {
        "quant_method": "secateur",
        "format_version": 2,
        "values": values,
        "group_size": 64,
    }
    other = {key: old for key, old in checkpoint.config.items() if key != "quantization_config"}
    assert other == Checkpoint(source).config
    for name, layer in report.layers.items():
        facts = manifest.layers[name]
        assert (facts.dense_bytes, facts.bytes) == (layer.dense_bytes, layer.packed_bytes)
        weights, scales = layer.shape[0] * layer.shape[1], 2 * layer.shape[0]
        assert layer.dense_bytes == weights // (1 if values == "int8" else 2) + scales
        assert layer.quantization_error is not None
        assert 0 < layer.quantization_error < {"int8": 1e-3, "int4": 5e-2}[values]
        assert layer.activation_error is not None
        assert 0 < layer.activation_error < 0.02
        assert facts.steps["quantize"] == {
            "method": "gptq",
            "relative_error": layer.quantization_error,
            "activation_error": layer.activation_error,
            "damping_retries": 0,
        }
    assert manifest.layers[DENSE].kept_dense == "asked"
    assert report.layers[DENSE].ratio == 1
    assert report.linears_packed_bytes < report.linears_dense_bytes
    unchanged = checkpoint.load("model.embed_tokens.weight")
    assert torch.equal(unchanged, Checkpoint(source).load("model.embed_tokens.weight"))


def inputs_of(model: Any, layer: str, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    hook.remove()
    return torch.cat([states[0] for states in seen])


def test_a_block_sees_what_the_quantised_blocks_put_out(
    source: Path, tmp_path: Path, text: Calibration
) -> None:
    """The errors of block 1 on inputs from transformers' own forward of quantised block 0."""
    report = pack_model(source, tmp_path / "packed", values="int4", calibration=text, quiet=True)
    packed = read_packed(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(source)
    for name in packed.layers:
        if name.startswith("model.layers.0."):
            model.get_submodule(name).weight.data = packed.load(f"{name}.weight")
    inputs = inputs_of(model, LAYER, load_file(text.data)["input_ids"])
    before, after = model.get_submodule(LAYER).weight.detach(), packed.load(f"{LAYER}.weight")
    lost, whole = (inputs @ (before - after).t()).norm(), (inputs @ before.t()).norm()
    told = report.layers[LAYER]
    assert told.quantization_error == pytest.approx(float((lost / whole) ** 2), rel=1e-3)
    assert told.activation_error == pytest.approx(activation_error(after, inputs, 64), rel=1e-3)


def test_rtn_reads_no_text(source: Path, tmp_path: Path, text: Calibration) -> None:
    report = pack_model(source, tmp_path / "packed", values="int4", quantize="rtn")
    assert report.calibration is None
    packed = read_packed(tmp_path / "packed")
    for name, layer in report.layers.items():
        assert (layer.quantization_error, layer.activation_error) == (None, None)
        weight = Checkpoint(source).load(f"{name}.weight")
        nearest = rtn(weight, packed.mask(name), 7, 64)
        assert torch.equal(packed.load(f"{name}.weight"), nearest.dense())
    both = {
        quantize: pack_model(
            source,
            tmp_path / quantize,
            values="int4",
            quantize=quantize,
            calibration=text,
            quiet=True,
        )
        for quantize in ("rtn", "gptq")
    }
    for name in packed.names():  # with a text rtn measures, and decides the same
        assert torch.equal(packed.load(name), read_packed(tmp_path / "rtn").load(name))
    errors = {
        quantize: sum(layer.quantization_error or 1 for layer in one.layers.values())
        for quantize, one in both.items()
    }
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_the_models_own_text_is_the_default(source: Path, tmp_path: Path) -> None:
    short = Calibration(samples=2, length=8)
    told = pack_model(source, tmp_path / "out", values="int8", calibration=short, quiet=True)
    assert told.calibration == short
    here = tmp_path / "here.txt"
    here.touch()
    for data, wanted in [
        ("self", "self"),
        ("pydoc", "pydoc"),
        (str(here), str(here)),
        (str(tmp_path / "gone.txt"), "self"),
        ("wikitext2", "self"),
        ("none", "self"),
    ]:
        assert usual_text({"calibration": {"data": data}}) == wanted
    assert usual_text({}) == "self"


def test_a_run_that_was_cut_off_goes_on(
    source: Path, tmp_path: Path, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(output: str) -> None:
        pack_model(source, tmp_path / output, values="int4", calibration=text, quiet=True)

    pack("whole")
    taken: list[str] = []
    solve = calibrate.Quantizer.solve

    def stop(self: Any, *arguments: Any) -> Any:
        taken.append("layer")
        if len(taken) == 10:  # in block 1
            raise KeyboardInterrupt
        return solve(self, *arguments)

    monkeypatch.setattr(calibrate.Quantizer, "solve", stop)
    with pytest.raises(KeyboardInterrupt):
        pack("cut")
    pack("cut")
    assert len(taken) == 10 + 7  # block 0 was not done again
    for file in ("manifest.json", "config.json", *(f.name for f in Checkpoint(source).files)):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_what_was_not_begun_leaves_nothing(source: Path, tmp_path: Path, text: Calibration) -> None:
    pruned = Path(shutil.copytree(source, tmp_path / "pruned"))
    name = "model.layers.0.self_attn.q_proj.weight"

    def revive(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name][tuple((tensors[name] == 0).nonzero()[0])] = 0.5

    for file in Checkpoint(pruned).files:
        rewrite(pruned, revive, file.name)
    with pytest.raises(ModelError, match=r"q_proj.weight' is 0.5 at row 0.* mask removes"):
        pack_model(pruned, tmp_path / "packed", values="int8", calibration=text, quiet=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pruned"]


def test_the_dense_twin(source: Path, tmp_path: Path, text: Calibration) -> None:
    pack_model(source, tmp_path / "packed", values="int4", calibration=text, quiet=True)
    packed = read_packed(tmp_path / "packed")
    for values, dtype in ((None, torch.float32), ("bf16", torch.bfloat16)):
        write_dense(tmp_path / "packed", tmp_path / f"{values}", values=values)
        twin = Checkpoint(tmp_path / f"{values}")
        assert twin.names() == packed.names()
        assert "quantization_config" not in twin.config
        for name in packed.names():
            assert torch.equal(twin.load(name), packed.load(name).to(dtype))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    write_dense(tmp_path / "packed", tmp_path / "fp16")  # a linear is made in the model's type
    assert Checkpoint(tmp_path / "fp16").dtype(f"{LAYER}.weight") == "F16"
    for values in ("int8", "int4"):
        with pytest.raises(UsageError, match="floating-point weights, not int"):
            write_dense(source, tmp_path / "no", values=values)


def test_a_model_without_pruned_layers_can_be_quantised(tmp_path: Path, text: Calibration) -> None:
    pruned = prune_by_hand(tmp_path / "pruned", dense=("proj",))
    report = pack_model(pruned, tmp_path / "packed", values="int8", calibration=text, quiet=True)
    assert {layer.pattern for layer in report.layers.values()} == {"dense"}
    assert report.linears_packed_bytes == report.linears_dense_bytes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"values": "int5"}, "did you mean"),
        ({"group_size": 48}, "group_size = 48"),
        ({"quantize": "awq"}, "quantize = 'awq'"),
        ({"device": "tpu"}, "no device 'tpu'"),
    ],
)
def test_settings_that_are_not_known(
    source: Path, tmp_path: Path, text: Calibration, options: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        pack_model(source, tmp_path / "out", **{"values": "int8", "calibration": text, **options})


def test_weights_too_large_for_a_scale(tmp_path: Path) -> None:
    pruned = prune_by_hand(tmp_path / "pruned")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"] *= 1e9

    rewrite(pruned, enlarge, "model.safetensors")
    with pytest.raises(ModelError, match="too large for scales in fp16") as refused:
        pack_model(pruned, tmp_path / "packed", values="int8", quantize="rtn")
    assert LAYER in refused.value.what
