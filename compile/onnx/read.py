"""ONNX files of any origin: opened safely, and the zeros and patterns of their linears.

A file of secateur is read through its bitmasks; in any other one a linear is a Gemm, MatMul or
MatMulNBits with a constant two-dimensional weight, and its zeros tell the pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.compile.onnx.environment import require
from secateur.errors import ModelError

_AGAIN = "write it again with `secateur compile --format onnx`, or copy it again"


def read_graph(path: Path) -> Any:
    """Read a graph without its external data, and check that all that it names is there.

    Returns:
        an ``onnx.ModelProto``.

    Raises:
        ModelError: the file is missing or damaged, an external file is missing, outside the
            directory or too short, or the opset is newer than the installed onnx knows.
        EnvironmentFault: onnx is not installed.
    """
    require("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ModelError(f"there is no ONNX file {path}", "give a directory with model.onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as fault:
        raise ModelError(f"{path} is not an ONNX file: {fault}", _AGAIN) from fault
    if not model.opset_import or not model.graph.node:
        raise ModelError(f"{path} is not an ONNX file: it has no opset or no graph", _AGAIN)
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ModelError(
                f"{path} is of opset {opset.version}; the installed onnx knows up to {newest}",
                "update onnx and onnxruntime, or export the model for an older opset",
            )
    _check_external(path, model)
    return model


def _check_external(path: Path, model: Any) -> None:
    from onnx import TensorProto
    from onnx.external_data_helper import ExternalDataInfo

    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        info = ExternalDataInfo(tensor)
        file = path.parent / info.location
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise ModelError(
                f"{path}: {tensor.name} lies in {info.location}, outside the directory",
                "export the model with its data beside the graph",
            )
        end = (info.offset or 0) + (info.length or 0)
        size = file.stat().st_size if file.is_file() else None
        if size is None or size < end:
            state = "is missing" if size is None else f"has {size} bytes and needs {end}"
            raise ModelError(f"{path}: its data file {info.location} {state}", _AGAIN)


@dataclass(frozen=True)
class Survey:
    """What is in an ONNX file.

    Attributes:
        opset: of the standard ops.
        producer: the program that wrote it, as it says itself.
        files: the file and those that hold its data.
        layers: for each linear, by the name of the weight: shape, pattern, zeros, bytes and
            dense_bytes.
    """

    opset: int
    producer: str
    files: list[Path]
    layers: dict[str, dict[str, Any]]


def survey(path: Path) -> Survey:
    """Find the pattern of every linear of an ONNX file.

    Args:
        path: of the file; one weight at a time is in memory.

    Raises:
        ModelError: see `read_graph`.
    """
    import torch

    from secateur.compile.zeros import pattern_of

    model = read_graph(path)
    found = {}
    for name, weight, size, dense in _linears(path, model):
        if weight.ndim != 2 or not weight.size:
            continue
        zeros = torch.from_numpy(np.ascontiguousarray(weight != 0)).float()
        found[name.removesuffix(".weight")] = {
            "shape": list(weight.shape),
            "pattern": str(pattern_of(zeros)),
            "zeros": float((zeros == 0).float().mean()),
            "bytes": size,
            "dense_bytes": dense,
        }
    opsets = {one.domain: one.version for one in model.opset_import}
    producer = f"{model.producer_name} {model.producer_version}".strip() or "an unnamed program"
    files = [path, *sorted({path.parent / one for one in _locations(model)})]
    return Survey(opsets.get("", opsets.get("ai.onnx", 0)), producer, files, found)


def _locations(model: Any) -> Iterator[str]:
    """The data files of a graph."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                yield entry.value


def _linears(path: Path, model: Any) -> Iterator[tuple[str, np.ndarray[Any, Any], int, int]]:
    """Name, weight ``[out, in]``, stored bytes and dense bytes of each linear."""
    import onnx
    from onnx import numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def load(name: str) -> np.ndarray[Any, Any]:
        if name in sparse:
            return _dense(sparse[name])
        tensor = onnx.TensorProto()
        tensor.CopyFrom(tensors[name])
        array: np.ndarray[Any, Any] = numpy_helper.to_array(tensor, base_dir=str(path.parent))
        return array

    done = set()
    for node in graph.node:
        if node.op_type not in ("Gemm", "MatMul", "MatMulNBits") or len(node.input) < 2:
            continue
        maker, name, turned = makers.get(node.input[1]), node.input[1], node.op_type == "MatMul"
        turned |= node.op_type == "Gemm" and not _attribute(node, "transB", 0)
        while maker is not None and maker.op_type in ("Cast", "DequantizeLinear", "Transpose"):
            turned ^= maker.op_type == "Transpose"
            name = maker.input[0]
            maker = makers.get(name)
        if name in done:
            continue
        done.add(name)
        if maker is not None and maker.op_type.startswith("Bitmask"):
            stem = maker.input[0].removesuffix(".bits")
            bits, kept = load(maker.input[0]), load(maker.input[1])
            columns = _attribute(node, "K", 0) or int(load(maker.input[2])[0])
            mask = np.unpackbits(bits, axis=1, bitorder="little")[:, :columns]
            width = _attribute(node, "bits", 8 * kept.itemsize)
            yield stem, mask, bits.nbytes + kept.nbytes, mask.size * width // 8
        elif node.op_type == "MatMulNBits" and name in tensors:
            packed = load(name)
            yield name, _nibbles(node, packed), packed.nbytes, packed.nbytes
        elif name in tensors or name in sparse:
            weight = load(name)
            size = dense = weight.size * weight.itemsize
            if name in sparse:
                parts = (sparse[name].values, sparse[name].indices)
                size = sum(len(part.raw_data) for part in parts)
            yield name, weight.T if turned else weight, size, dense


def _nibbles(node: Any, packed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers of a MatMulNBits without zero points, as ``[out, in]``."""
    bits, columns = _attribute(node, "bits", 4), _attribute(node, "K", 0)
    codes = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return codes[:, :columns].astype(np.int16) - (1 << bits - 1)


def _dense(tensor: Any) -> np.ndarray[Any, Any]:
    """A SparseTensorProto with places in one dimension, or one for each axis, as an array."""
    from onnx import numpy_helper

    values, places = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    array = np.zeros(tuple(tensor.dims), values.dtype)
    if places.ndim == 1:
        array.reshape(-1)[places] = values
    else:
        array[tuple(places.T)] = values
    return array


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(one.i) for one in node.attribute if one.name == name), default)
