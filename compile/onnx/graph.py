"""The traced graph with its weights: each linear becomes a Gemm or a MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from secateur.compile.onnx.trace import DOMAIN, LINEAR

_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits; with less it is 20 to 500 times slower


@dataclass(frozen=True)
class Stored:
    """How a weight is stored.

    Attributes:
        tensors: what is stored, by the end of its name; the first is the weight, or what the
            function ``expand`` makes it of.
        expand: a function of `functions` that makes the weight of the first two tensors.
        shape: the last argument of that function.
        scales: of integers, ``[rows, groups]``.
        group: columns that share a scale.
        bits: of the integers if MatMulNBits is to multiply with them; 0: they become floats.
    """

    tensors: Mapping[str, ir.TensorProtocol]
    expand: str | None = None
    shape: tuple[int, ...] = ()
    scales: ir.TensorProtocol | None = None
    group: int = 0
    bits: int = 0


@dataclass
class _Operand:
    weight: ir.Value
    scales: ir.Value | None
    stored: Stored


@dataclass
class _Builder:
    graph: ir.Graph
    before: ir.Node
    imports: dict[str, int]
    constants: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
        self.graph.initializers[name] = value
        return value

    def numbers(self, *numbers: int) -> ir.Value:
        if numbers not in self.constants:
            name = "shape_" + "_".join(map(str, numbers))
            tensor = ir.tensor(np.array(numbers, np.int64), name=name)
            self.constants[numbers] = self.initializer(name, tensor)
        return self.constants[numbers]

    def node(
        self, op: str, inputs: list[ir.Value], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, domain=domain)
        node.outputs[0].name = name
        self.imports.setdefault(domain, 1)
        self.graph.insert_before(self.before, node)
        return node.outputs[0]


def fill(
    model: ir.Model,
    parameters: Mapping[str, str],
    stored: Callable[[str, tuple[int, ...]], Stored],
) -> None:
    """Give a traced graph its weights, in place.

    Args:
        model: from `trace`.
        parameters: for each initializer that is a parameter, the name of its tensor; two of the
            same name become one.
        stored: how a tensor of a name and shape is stored.
    """
    builder = _Builder(model.graph, model.graph[0], model.opset_imports)
    made: dict[str, _Operand] = {}
    operands: dict[int, _Operand] = {}
    for old_name, tensor in parameters.items():
        if (old := model.graph.initializers.pop(old_name, None)) is None:
            continue
        if tensor not in made:
            shape = tuple(int(extent) for extent in old.shape or ())
            made[tensor] = _insert(builder, tensor, stored(tensor, shape))
        operands[id(made[tensor].weight)] = made[tensor]
        ir.convenience.replace_all_uses_with(old, made[tensor].weight)
    for node in list(model.graph):
        if (node.domain, node.op_type) == (DOMAIN, LINEAR):
            _lower(builder, node, operands[id(node.inputs[1])])


def _insert(builder: _Builder, name: str, stored: Stored) -> _Operand:
    """Initializers, and the nodes that make a weight of them."""
    values = [builder.initializer(name + end, tensor) for end, tensor in stored.tensors.items()]
    value, scales = values[0], None
    if stored.expand is not None:
        shape = builder.numbers(*stored.shape)
        value = builder.node(stored.expand, [*values, shape], name + ".expanded", DOMAIN)
    if stored.scales is not None:
        scales = builder.initializer(name + ".scales", stored.scales)
        scales = _float(builder, scales, stored.scales.dtype, name + ".scales")
    if stored.bits:
        return _Operand(value, scales, stored)
    if scales is not None:
        value = builder.node(
            "DequantizeLinear", [value, scales], name + ".float", axis=1, block_size=stored.group
        )
    else:
        value = _float(builder, value, values[-1].dtype, name)
    return _Operand(value, None, stored)


def _float(builder: _Builder, value: ir.Value, kind: ir.DataType | None, name: str) -> ir.Value:
    if kind == ir.DataType.FLOAT:
        return value
    return builder.node("Cast", [value], name + ".float", to=int(ir.DataType.FLOAT))


def _lower(builder: _Builder, node: ir.Node, operand: _Operand) -> None:
    """Put standard ops in the place of a linear: x ``[batch, new, in]``, W ``[out, in]``."""
    builder.before = node
    x, output = node.inputs[0], node.outputs[0]
    bias = list(node.inputs[2:])
    assert x is not None
    assert x.shape is not None
    assert output.shape is not None
    columns, rows, name = int(x.shape[-1]), int(output.shape[-1]), output.name
    if operand.stored.bits:
        attributes = {
            "K": columns, "N": rows, "bits": operand.stored.bits,
            "block_size": operand.stored.group, "accuracy_level": _INT8_ACTIVATIONS,
        }  # fmt: skip
        inputs = [x, operand.weight, operand.scales, *([None, None, *bias] if bias else [])]
        new = builder.node("MatMulNBits", inputs, f"{name}.product", "com.microsoft", **attributes)
    else:
        flat = builder.node("Reshape", [x, builder.numbers(-1, columns)], f"{name}.rows")
        product = builder.node("Gemm", [flat, operand.weight, *bias], f"{name}.product", transB=1)
        like = builder.node("Shape", [x], f"{name}.leading", start=0, end=2)
        shape = builder.node("Concat", [like, builder.numbers(rows)], f"{name}.shape", axis=0)
        new = builder.node("Reshape", [product, shape], f"{name}.folded")
    new.shape, new.type = output.shape, output.type
    ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
    if name == "logits":
        output.name, new.name = "logits.traced", name
    builder.graph.remove(node, safe=True)
