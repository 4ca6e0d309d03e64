"""What our kernels are compared with: torch, and graphs of a few nodes in ONNX Runtime.

A peer multiplies the dense weight of which the sparse ones are parts, in its own best form. The
weight stands in memory several times, and every multiplication takes the next copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from secateur.bench.kernel_rounds import Runner, Subject, rotation
from secateur.bench.kernel_weights import Array, ValueType, Weights

# Names of the peers, and what is told of them.
PEERS = {
    "torch-fp32": "torch.mm, float32 weights",
    "torch-bf16": "torch.mm, bfloat16 weights and inputs",
    "ort-fp32": "ONNX Runtime MatMul, float32 weights",
    "ort-int8": "ONNX Runtime DynamicQuantizeLinear + MatMulInteger: int8 weights with a scale a "
    "row, uint8 inputs with a scale for all tokens",
    "ort-nbits8": "ONNX Runtime MatMulNBits, 8 bits, accuracy_level 4: a scale for each block",
    "ort-nbits4": "ONNX Runtime MatMulNBits, 4 bits, accuracy_level 4: a scale for each block",
}
_FLOATS = ("torch-fp32", "torch-bf16", "ort-fp32")
PEERS_OF: dict[ValueType, tuple[str, ...]] = {
    "fp32": _FLOATS,
    "bf16": _FLOATS,
    "fp16": _FLOATS,
    "int8": ("ort-nbits8", "ort-int8"),
    "int4": ("ort-nbits4",),
    "fp8": (),
}
_OPSETS = (("", 21), ("com.microsoft", 1))
_SESSIONS = 16  # among which the copies are divided: a step of the rotation stays short
_LARGEST_GRAPH = 2**30  # bytes; a file of protocol buffers ends at 2 GiB


def peer_bytes(name: str, rows: int, columns: int, block: int) -> int:
    """Bytes of a peer's weight: values and scales."""
    blocks = rows * -(-columns // block)
    if name == "ort-nbits8":
        return blocks * (block + 4)
    if name == "ort-nbits4":
        return blocks * (block // 2 + 4)
    if name == "ort-int8":
        return rows * (columns + 4)
    return rows * columns * (2 if name == "torch-bf16" else 4)


def make_peer(
    name: str, weights: Weights, block: int, copies: int, threads: int, spin: bool
) -> Subject:
    """Put a weight into the form of a peer, so many times.

    Raises:
        ImportError: the peer is not installed.
    """
    if name.startswith("torch-"):
        return TorchPeer(name, weights, copies)
    return OnnxPeer(name, weights, block, copies, threads, spin)


class TorchPeer:
    """``torch.mm`` into a buffer: what a linear layer calls, without the layer."""

    def __init__(self, name: str, weights: Weights, copies: int) -> None:
        import torch

        dtype = torch.bfloat16 if name == "torch-bf16" else torch.float32
        first = torch.from_numpy(weights.dense()).to(dtype)
        self.weights = [first, *(first.clone() for _ in range(copies - 1))]
        self.nbytes, self.copies = first.nbytes, copies

    def bind(self, x: Array) -> Runner:
        """Make ready to multiply."""
        import torch

        given = torch.from_numpy(x).to(self.weights[0].dtype)
        out = torch.empty(len(x), len(self.weights[0]), dtype=given.dtype)

        calls = cycle([partial(torch.mm, given, weight.t(), out=out) for weight in self.weights])
        return Runner(rotation(calls), 1, lambda: np.asarray(out.float().numpy()))


class OnnxPeer:
    """Graphs of equal nodes that have a copy of the weight each; a step runs one whole graph.

    So what is timed is the node and ONNX Runtime's way to it, not the call from Python. Each node
    has an input of its own (all are the same memory), lest the optimiser unite what is equal.
    """

    def __init__(
        self, name: str, weights: Weights, block: int, copies: int, threads: int, spin: bool
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.rows, self.columns = weights.shape
        constants = _constants(name, weights, block)
        self.nbytes = sum(array.nbytes for array in constants.values())
        self.nodes = max(1, min(-(-copies // _SESSIONS), _LARGEST_GRAPH // self.nbytes))
        model = _graph(name, constants, self.rows, self.columns, block, self.nodes)
        self.sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(-(-copies // self.nodes))
        ]
        self.copies = self.nodes * len(self.sessions)

    def bind(self, x: Array) -> Runner:
        """Make ready to multiply."""
        out = np.empty((len(x), self.rows), dtype=np.float32)

        def call(session: Any) -> Callable[[], object]:
            binding = session.io_binding()
            for i in range(self.nodes):
                binding.bind_input(f"x{i}", "cpu", 0, np.float32, x.shape, x.ctypes.data)
                binding.bind_output(f"y{i}", "cpu", 0, np.float32, out.shape, out.ctypes.data)
            return partial(session.run_with_iobinding, binding)

        calls = cycle([call(session) for session in self.sessions])
        held = (out, x)  # the bindings know addresses only
        return Runner(rotation(calls), self.nodes, lambda: held[0])


def _constants(name: str, weights: Weights, block: int) -> dict[str, Array]:
    """The weight as initialisers of a node."""
    if name in ("ort-nbits4", "ort-nbits8"):
        return _blocks(weights, block, 4 if name == "ort-nbits4" else 8)
    weight = weights.dense()
    if name == "ort-fp32":
        return {"w": np.ascontiguousarray(weight.T)}
    scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / np.float32(127)
    whole = np.rint(weight / scale[:, None]).astype(np.int8)
    return {"w": np.ascontiguousarray(whole.T), "s": scale}


def _blocks(weights: Weights, block: int, bits: int) -> dict[str, Array]:
    """Blocks of a row with their largest value at the end of the range, as MatMulNBits wants."""
    rows, columns = weights.shape
    limit = 2 ** (bits - 1) - 1
    weight = np.pad(weights.dense(), ((0, 0), (0, -columns % block))).reshape(rows, -1, block)
    scale = np.abs(weight).max(axis=2) / np.float32(limit)
    whole = np.rint(weight / np.where(scale > 0, scale, 1)[:, :, None]).astype(np.int16)
    values = (whole + limit + 1).astype(np.uint8)  # the zero point is the middle unless given
    if bits == 4:
        values = values[:, :, 0::2] | values[:, :, 1::2] << 4
    return {"w": values, "s": scale.reshape(-1)}


def _graph(
    name: str, constants: dict[str, Array], rows: int, columns: int, block: int, nodes: int
) -> bytes:
    """A model of several such nodes, each with its weight, input and output."""
    from onnx import TensorProto, helper, numpy_helper

    def value(text: str, width: int) -> Any:
        return helper.make_tensor_value_info(text, TensorProto.FLOAT, ["tokens", width])

    graph = helper.make_graph(
        [node for i in range(nodes) for node in _nodes(name, rows, columns, block, i)],
        name,
        [value(f"x{i}", columns) for i in range(nodes)],
        [value(f"y{i}", rows) for i in range(nodes)],
        [
            numpy_helper.from_array(array, f"{key}{i}")
            for i in range(nodes)
            for key, array in constants.items()
        ],
    )
    opsets = [helper.make_opsetid(domain, number) for domain, number in _OPSETS]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def _nodes(name: str, rows: int, columns: int, block: int, i: int) -> list[Any]:
    """The nodes that make ``y{i}`` of ``x{i}``."""
    from onnx import TensorProto
    from onnx.helper import make_node

    if name == "ort-fp32":
        return [make_node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"])]
    if name != "ort-int8":
        return [
            make_node(
                "MatMulNBits",
                [f"x{i}", f"w{i}", f"s{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=4 if name == "ort-nbits4" else 8,
                block_size=block,
                accuracy_level=4,
            )
        ]
    return [  # ONNX Runtime fuses these into one
        make_node("DynamicQuantizeLinear", [f"x{i}"], [f"q{i}", f"t{i}", f"z{i}"]),
        make_node("MatMulInteger", [f"q{i}", f"w{i}", f"z{i}"], [f"a{i}"]),
        make_node("Cast", [f"a{i}"], [f"f{i}"], to=TensorProto.FLOAT),
        make_node("Mul", [f"t{i}", f"s{i}"], [f"m{i}"]),
        make_node("Mul", [f"f{i}", f"m{i}"], [f"y{i}"]),
    ]
