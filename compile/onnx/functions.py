"""The ops that the graph calls and ONNX has not, as functions of standard ops in the same file.

A runtime with a kernel of its own for ``com.microsoft::GroupQueryAttention`` uses that; any other
one inlines the function. Heads of a width that ONNX Runtime's kernel refuses call the same
function in our own domain. The functions of weights have constant arguments: a runtime that folds
constants computes each weight once, when it opens the model.

``bits`` is the bitmask of docs/format.md: uint8 ``[rows, columns / 8]``, little-endian. ``kept`` is
one dimension: a zero, then the kept values in row-major order.
"""

from __future__ import annotations

from typing import Any

import onnx_ir
from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset

from secateur.compile.onnx.trace import DOMAIN, MICROSOFT

_own = Opset(DOMAIN, 1)
_microsoft = Opset(MICROSOFT, 1)


@script(_own)
def Places(bits):  # type: ignore[no-untyped-def]
    """For each weight, in row-major order, 0 or its place in ``kept``."""
    eight = op.Constant(value_ints=[0, 1, 2, 3, 4, 5, 6, 7])
    one = op.Cast(op.Constant(value_int=1), to=2)
    shifted = op.BitShift(
        op.Unsqueeze(bits, op.Constant(value_ints=[-1])), op.Cast(eight, to=2), direction="RIGHT"
    )
    flat = op.Cast(op.Reshape(op.BitwiseAnd(shifted, one), op.Constant(value_ints=[-1])), to=6)
    return op.Mul(op.CumSum(flat, op.Constant(value_int=0)), flat)


@script(_own)
def BitmaskWeight(bits, kept, columns):  # type: ignore[no-untyped-def]
    """A weight ``[rows, columns]`` of the type of ``kept``."""
    flat = op.Gather(kept, _own.Places(bits))
    rows = op.Shape(bits, start=0, end=1)
    whole = op.Reshape(flat, op.Concat(rows, op.Constant(value_ints=[-1]), axis=0))
    return op.Slice(whole, op.Constant(value_ints=[0]), columns, op.Constant(value_ints=[1]))


@script(_own)
def BitmaskInt8(bits, kept, shape):  # type: ignore[no-untyped-def]
    """The operand B of MatMulNBits, ``[rows, groups, group]``, of bytes with zero at 128."""
    return op.Reshape(op.Gather(kept, _own.Places(bits)), shape)


@script(_own)
def BitmaskInt4(bits, kept, shape):  # type: ignore[no-untyped-def]
    """The operand B of MatMulNBits, ``[rows, groups, group / 2]``, of nibbles with zero at 8."""
    four = op.Cast(op.Constant(value_int=4), to=2)
    low = op.Cast(op.Constant(value_int=15), to=2)
    halves = op.Cast(op.Constant(value_ints=[0, 4]), to=2)
    last = op.Constant(value_ints=[-1])
    both = op.BitShift(op.Unsqueeze(kept, last), halves, direction="RIGHT")
    nibbles = op.Reshape(op.BitwiseAnd(both, low), last)
    pairs = op.Reshape(op.Gather(nibbles, _own.Places(bits)), op.Constant(value_ints=[-1, 2]))
    first, second = op.Split(pairs, num_outputs=2, axis=1)
    return op.Reshape(op.BitwiseOr(first, op.BitShift(second, four, direction="LEFT")), shape)


@script(_microsoft)
def GroupQueryAttention(  # type: ignore[no-untyped-def]
    query, key, value, past_key, past_value, lengths, length, cos, sin, positions, bias,
    num_heads: int, kv_num_heads: int, scale: float, softcap: float,
):  # fmt: skip
    """``softmax(cap(scale · Q·Kᵀ) + bias)·V``, with ``cap(s) = c·tanh(s / c)`` if c is not 0."""
    zero = op.Constant(value_ints=[0])
    last = op.Constant(value_ints=[-1])
    groups = op.Reshape(op.Constant(value_int=kv_num_heads), last)
    split = op.Concat(zero, zero, groups, last, axis=0)
    new_key = op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3])
    new_value = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    present_key = op.Concat(past_key, new_key, axis=2)
    present_value = op.Concat(past_value, new_value, axis=2)
    width = op.Shape(past_key, start=3, end=4)
    heads = op.Concat(zero, zero, groups, last, width, axis=0)
    grouped = op.Transpose(op.Reshape(query, heads), perm=[0, 2, 3, 1, 4])
    second = op.Constant(value_ints=[2])
    keys = op.Unsqueeze(op.Transpose(present_key, perm=[0, 1, 3, 2]), second)
    scaled = op.Mul(op.MatMul(grouped, keys), op.Constant(value_float=scale))
    cap = op.Constant(value_float=softcap)
    some = op.Constant(value_float=1e-6)
    capped = op.Mul(op.Tanh(op.Div(scaled, op.Max(cap, some))), cap)
    scores = op.Where(op.Greater(cap, some), capped, scaled)
    weights = op.Softmax(op.Add(scores, op.Unsqueeze(bias, second)), axis=-1)
    joined = op.MatMul(weights, op.Unsqueeze(present_value, second))
    output = op.Reshape(
        op.Transpose(joined, perm=[0, 3, 1, 2, 4]), op.Concat(zero, zero, last, axis=0)
    )
    return output, present_key, present_value


def functions(model: onnx_ir.Model) -> list[onnx_ir.Function]:
    """The functions that the nodes of a graph call, and those that they call in turn."""
    called = {(node.domain, node.op_type) for node in model.graph}
    if any(name.startswith("Bitmask") for _, name in called):
        called.add((DOMAIN, "Places"))
    known: dict[str, Any] = {
        one.name: one
        for one in (Places, BitmaskWeight, BitmaskInt8, BitmaskInt4, GroupQueryAttention)
    }
    found = []
    for domain, name in sorted(called):
        if name in known:
            proto = known[name].to_function_proto()
            proto.domain = domain
            found.append(onnx_ir.serde.deserialize_function(proto))
    return found
