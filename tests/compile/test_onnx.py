"""The format onnx: every storage against plain numpy, transformers, and the ONNX reference."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from secateur.bits import pack_mask
from secateur.compile import pack_model, write_dense, write_onnx
from secateur.compile.onnx import functions, trace
from secateur.compile.onnx.read import read_graph, survey
from secateur.compile.onnx.sparse import break_even
from secateur.errors import EnvironmentFault, ModelError, UsageError
from secateur.model import load_causal_lm
from secateur.serve.onnx.session import OnnxModel
from tests.compile.conftest import prune_by_hand

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Path:
    """A 2:4 Llama with rows that are no multiple of 8 columns, and a head tied to the embeddings.

    Tracing takes seconds and depends on the config alone: it is done once for each.
    """
    folder = tmp_path_factory.mktemp("onnx")
    patch.setenv("SECATEUR_CACHE", str(folder / "cache"))
    prune_by_hand(folder / "pruned", hidden=36, inner=44, tied=True, dense=("k_proj",))
    traced: dict[str, ir.Model] = {}
    plain = trace.trace

    def once(module: Any) -> ir.Model:
        kind = module.config.model_type
        if kind not in traced:
            traced[kind] = plain(module)
        return traced[kind].clone()

    patch.setattr(trace, "trace", once)
    return folder / "pruned"


@pytest.fixture(scope="module")
def written(model: Path) -> Callable[..., Path]:
    """The model as ONNX, each variant written once."""

    def write(source: Path = model, **options: Any) -> Path:
        name = source.name + "".join(f"-{value}" for value in options.values())
        output = model.parent / f"{name}.onnx"
        if not output.exists():
            write_onnx(source, output, quiet=True, **options)
        return output

    return write


def run_weight(function: str, bits: Array, kept: Array, shape: list[int]) -> Array:
    """What a function of the file makes of stored tensors, by ONNX Runtime."""
    kind = helper.np_dtype_to_tensor_dtype(kept.dtype)
    protos = [getattr(functions, name).to_function_proto() for name in ("Places", function)]
    inputs = [
        numpy_helper.from_array(bits, "bits"),
        numpy_helper.from_array(kept, "kept"),
        numpy_helper.from_array(np.array(shape, np.int64), "shape"),
    ]
    node = helper.make_node(function, ["bits", "kept", "shape"], ["weight"], domain="secateur")
    output = helper.make_tensor_value_info("weight", kind, None)
    graph = helper.make_graph([node], "weight", [], [output], inputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("secateur", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, functions=protos, ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    result: Array = session.run(None, {})[0]
    return result


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_a_bitmask_weight_is_the_weight(rows: int, columns: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    mask = draw.random((rows, columns)) < 0.5
    weight = np.where(mask, draw.standard_normal(mask.shape), 0).astype(np.float32)
    bits = pack_mask(torch.from_numpy(mask)).numpy()
    kept = np.concatenate([[0], weight[mask]]).astype(np.float32)
    assert np.array_equal(run_weight("BitmaskWeight", bits, kept, [columns]), weight)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
def test_a_bitmask_of_integers_is_what_matmulnbits_takes(
    rows: int, groups: int, width: int, seed: int
) -> None:
    draw, zero = np.random.default_rng(seed), 1 << width - 1
    mask = draw.random((rows, groups * 16)) < 0.5
    codes = np.where(mask, draw.integers(1, 2 * zero, mask.shape), zero).astype(np.uint8)
    bits = pack_mask(torch.from_numpy(mask)).numpy()
    kept, want = [zero, *codes[mask].tolist()], codes.tolist()
    if width == 4:
        kept += [0] * (len(kept) % 2)
        kept = [low + 16 * high for low, high in zip(kept[::2], kept[1::2], strict=True)]
        want = [
            [low + 16 * high for low, high in zip(row[::2], row[1::2], strict=True)] for row in want
        ]
    shape = [rows, groups, 2 * width]
    found = run_weight(f"BitmaskInt{width}", bits, np.array(kept, np.uint8), shape)
    assert np.array_equal(found, np.array(want, np.uint8).reshape(shape))


def logits_of(directory: Path, ids: Array) -> Array:
    """Logits of every position: a prompt, a piece of prompt, then single tokens."""
    opened = OnnxModel.open(directory, threads=1, keep=False)
    cache: list[Any] = []
    pieces = []
    for piece in np.split(ids, [9, 14, 15, 16], axis=1):
        logits, cache = opened.step(piece, cache)
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)


def reference(
    directory: Path, ids: Array, mask: Array | None = None, attention: str = "sdpa"
) -> Array:
    module = load_causal_lm(directory, torch.float32)
    module.set_attn_implementation(attention)
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.from_numpy(ids)}
    if mask is not None:
        inputs["attention_mask"] = torch.from_numpy(mask)
        inputs["position_ids"] = torch.from_numpy(positions(mask))
    with torch.inference_mode():
        answer: Array = module(**inputs).logits.numpy()
    return answer


def positions(mask: Array) -> Array:
    return np.maximum(mask.cumsum(axis=1) - 1, 0)


IDS = np.random.default_rng(1).integers(0, 64, (1, 17))


@pytest.mark.parametrize("onnx_weights", ["bitmask", "dense", "sparse-initializer"])
def test_logits_are_those_of_the_pruned_model(
    onnx_weights: str, model: Path, written: Callable[..., Path]
) -> None:
    output = written(onnx_weights=onnx_weights)
    np.testing.assert_allclose(logits_of(output, IDS), reference(model, IDS), atol=1e-5)
    graph = read_graph(output / "model.onnx")
    full = onnx_weights != "sparse-initializer"  # of which the checker infers no types
    onnx.checker.check_model(str(output / "model.onnx"), full_check=full)
    names = [one.name for one in graph.graph.input]
    assert names[:5] == [
        "input_ids", "attention_mask", "position_ids",
        "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert [one.name for one in graph.graph.output][:2] == ["logits", "present.0.key"]
    called = {(node.domain, node.op_type) for node in graph.graph.node}
    assert called >= {("", "Gemm"), ("secateur", "GroupQueryAttention")}  # 18 is no multiple of 8
    assert all(node.op_type != "MatMul" for node in graph.graph.node)


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 2), ("phi3", 1)])
def test_other_families(
    family: str, layers: int, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Norms of 1 + w, windows of 8, capped scores and ONNX Runtime's kernel; fused linears."""
    source = make_model(tmp_path / family, family, num_hidden_layers=layers)
    write_onnx(source, tmp_path / "out", onnx_weights="dense")
    want = reference(source, IDS, attention="eager")  # sdpa leaves out the cap
    np.testing.assert_allclose(logits_of(tmp_path / "out", IDS), want, atol=1e-4)


def test_padding_on_the_left_changes_nothing(model: Path, written: Callable[..., Path]) -> None:
    session = onnxruntime.InferenceSession(str(written(onnx_weights="bitmask") / "model.onnx"))
    ids = np.random.default_rng(2).integers(0, 64, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[1, :3] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    empty = np.zeros((2, 2, 0, 18), np.float32)
    feeds |= {one.name: empty for one in session.get_inputs() if one.name not in feeds}
    found, want = session.run(["logits"], feeds)[0], reference(model, ids, mask)
    np.testing.assert_allclose(found[mask == 1], want[mask == 1], atol=1e-5)


def test_the_runtime_folds_bitmasks_into_weights(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    path = written(onnx_weights="bitmask") / "model.onnx"
    onnxruntime.InferenceSession(str(path), options)
    folded = onnx.load(str(tmp_path / "folded.onnx"), load_external_data=False)
    ops = {node.op_type for node in folded.graph.node}
    assert not ops & {"BitShift", "BitwiseAnd", "CumSum", "BitmaskWeight", "Places"}


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attention_is_also_a_function_of_standard_ops(softcap: float) -> None:
    """A runtime without the kernel: here the reference evaluator of onnx."""
    draw = np.random.default_rng(3)
    new, past, heads, shared, width = 3, 4, 4, 2, 8

    def random(*shape: int) -> Array:
        return draw.standard_normal(shape).astype(np.float32)

    feeds = {
        "query": random(1, new, heads * width),
        "key": random(1, new, shared * width),
        "value": random(1, new, shared * width),
        "past_key": random(1, shared, past, width),
        "past_value": random(1, shared, past, width),
        "lengths": np.array([past + new - 1], np.int32),
        "length": np.array(past + new, np.int32),
        "bias": np.triu(np.full((1, 1, new, past + new), -1e9, np.float32), past + 1),
    }
    names = [*[*feeds][:7], "", "", "", "bias"]
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", names, outputs, domain="com.microsoft",
        num_heads=heads, kv_num_heads=shared, scale=0.3, softcap=softcap,
    )  # fmt: skip
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    graph = helper.make_graph(
        [node], "attention",
        [helper.make_tensor_value_info(n, kinds[n], list(feeds[n].shape)) for n in feeds],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    body = functions.GroupQueryAttention.to_function_proto()
    proto = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10)
    plain = onnx.reference.ReferenceEvaluator(proto).run(None, feeds)
    kernel = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)
    for found, want in zip(plain, kernel, strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_integers_are_those_of_the_packed_model(
    values: Any, model: Path, written: Callable[..., Path]
) -> None:
    packed = model.parent / f"packed-{values}"
    pack_model(model, packed, values=values, group_size=32, quantize="rtn", quiet=True)
    write_dense(packed, model.parent / f"dense-{values}", values="fp32")
    want = reference(model.parent / f"dense-{values}", IDS)
    exact = logits_of(written(packed, onnx_weights="dense"), IDS)
    np.testing.assert_allclose(exact, want, atol=1e-4)
    quick = logits_of(written(packed, onnx_weights="bitmask"), IDS)  # activations of int8
    assert 0 < np.abs(quick - want).max() < 0.05 * np.abs(want).max()
    again = written(model, values=values, quantize="rtn", group_size=32)
    assert np.array_equal(logits_of(again, IDS), quick)


@pytest.mark.parametrize("values", ["fp16", "bf16"])
def test_other_floats_are_only_stored(
    values: Any, model: Path, written: Callable[..., Path]
) -> None:
    output = written(values=values)
    rounded = load_causal_lm(model, {"fp16": torch.float16, "bf16": torch.bfloat16}[values])
    with torch.inference_mode():
        want = rounded.float()(input_ids=torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits_of(output, IDS), want, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"onnx_weights": "bitmask"},
        {"onnx_weights": "dense"},
        {"onnx_weights": "sparse-initializer"},
        {"values": "int4", "quantize": "rtn", "group_size": 32},
    ],
)
def test_survey_reads_patterns_back(options: Any, written: Callable[..., Path]) -> None:
    layers = survey(written(**options) / "model.onnx").layers
    assert len(layers) == 15
    for name, layer in layers.items():
        dense = name.endswith(("k_proj", "embed_tokens"))
        assert layer["pattern"] == ("dense" if dense else "2:4"), name
    down = layers["model.layers.1.mlp.down_proj"]
    assert down["shape"] == [36, 44]
    assert down["zeros"] == pytest.approx(0.5, abs=0.01)


def test_survey_reads_files_of_others(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    weight = draw.standard_normal((24, 16)).astype(np.float32)  # [in, out]
    order = draw.random((6, 4, 16)).argsort(axis=1)
    weight.reshape(6, 4, 16)[order < 2] = 0
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy")
    x, y = shapes
    graph = helper.make_graph([node], "one", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
    layer = survey(tmp_path / "other.onnx").layers["w"]
    assert (layer["shape"], layer["pattern"], layer["zeros"]) == ([16, 24], "2:4", 0.5)


def test_sparse_initializers_say_what_they_cost(model: Path, tmp_path: Path) -> None:
    report = write_onnx(model, tmp_path / "sparse", onnx_weights="sparse-initializer")
    assert any("1.50 times" in note and "67 % zeros" in note for note in report.notes)
    for width in (4, 2, 1):
        at = break_even(width)
        assert at * width == pytest.approx((1 - at) * 8)


def test_the_report_counts_what_is_stored(model: Path, tmp_path: Path) -> None:
    report = write_onnx(model, tmp_path / "out")
    layer = report.layers["model.layers.0.mlp.up_proj"]
    assert layer.packed_bytes == 44 * 5 + 4 * (44 * 18 + 1)  # bits, and values after a zero
    assert layer.dense_bytes == 4 * 44 * 36
    files = [tmp_path / "out" / name for name in ("model.onnx", "model.onnx.data")]
    assert report.packed_bytes == sum(file.stat().st_size for file in files)


def test_what_cannot_be_written(
    model: Path, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    opt = make_model(tmp_path / "opt", "opt")
    with pytest.raises(ModelError, match="opt models are not written as ONNX"):
        write_onnx(opt, tmp_path / "out")
    with pytest.raises(UsageError, match="sparse initializer of int4"):
        write_onnx(model, tmp_path / "out", values="int4", onnx_weights="sparse-initializer")
    qwen = make_model(tmp_path / "qwen", "qwen2")
    with pytest.raises(ModelError, match="has no pruned linear"):
        write_onnx(qwen, tmp_path / "out", onnx_weights="sparse-initializer")
    with pytest.raises(UsageError, match="'bitmap' is not known"):
        write_onnx(model, tmp_path / "out", onnx_weights="bitmap")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.compile.onnx.environment.find_spec", lambda _: None)
    with pytest.raises(EnvironmentFault, match="ONNX needs onnx, which is not installed"):
        write_onnx(model, tmp_path / "out")


def damage_garbage(graph: Path) -> None:
    graph.write_bytes(b"not an onnx file at all")


def damage_empty(graph: Path) -> None:
    graph.write_bytes(b"")


def damage_data(graph: Path) -> None:
    (graph.parent / "model.onnx.data").unlink()


def damage_length(graph: Path) -> None:
    with (graph.parent / "model.onnx.data").open("r+b") as data:
        data.truncate(100)


def damage_opset(graph: Path) -> None:
    model = onnx.load(str(graph), load_external_data=False)
    model.opset_import[0].version = 999
    graph.write_bytes(model.SerializeToString())


def damage_location(graph: Path) -> None:
    model = onnx.load(str(graph), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../pruned/model.safetensors"
    graph.write_bytes(model.SerializeToString())


def damage_node(graph: Path) -> None:
    model = onnx.load(str(graph), load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOp"
    graph.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_garbage, "is not an ONNX file"),
        (damage_empty, "is not an ONNX file"),
        (damage_data, "data file model.onnx.data is missing"),
        (damage_length, "has 100 bytes and needs"),
        (damage_opset, "is of opset 999"),
        (damage_location, "outside the directory"),
        (damage_node, "cannot open .*NoSuchOp"),
    ],
)
def test_damage_is_said_in_a_sentence(
    damage: Callable[[Path], None], said: str, written: Callable[..., Path], tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(written(onnx_weights="bitmask"), tmp_path / "broken"))
    damage(broken / "model.onnx")
    with pytest.raises(ModelError, match=said):
        OnnxModel.open(broken, threads=1, keep=False)
