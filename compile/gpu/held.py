"""A packed linear on a GPU: the parts that its plan's back ends read, and the product.

matrix = hold(pieces, "bf16", torch.device("cuda"))
y = matrix.multiply(x, bias)      # x [tokens, columns], y [tokens, rows]
print(matrix.plan)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import pad

from secateur.compile.config import PackedLayer
from secateur.compile.gpu import crossover, cusparselt, fp8, machine
from secateur.compile.gpu.blocks import Blocks, make_blocks
from secateur.compile.gpu.dispatch import (
    BackEnd,
    Plan,
    Weight,
    candidates,
    choose,
    obstacle,
    refusal,
)
from secateur.compile.gpu.own import OwnProduct, library_for, metadata
from secateur.compile.stored import Array, Pieces, pieces
from secateur.compile.values import DTYPES
from secateur.pattern import Pattern
from secateur.recipe import ValueType

_TOKENS = 8  # that the sparse tensor cores take a multiple of, in 16 bits
DEVICE = "cuda"
"""The type of the devices that this is for. Tests put "cpu" here, with interpreted kernels."""


class GpuMatrix:
    """A packed linear in the layouts of its plan.

    Attributes:
        weight: what it is.
        plan: which back end computes with how many tokens.
    """

    def __init__(self, weight: Weight, plan: Plan, blocks: Blocks) -> None:
        self.weight, self.plan = weight, plan
        self.blocks = blocks
        self.dtype = DTYPES[weight.dtype]  # type: ignore[index]
        self._shared = 0  # bytes
        self._meta: torch.Tensor | None = None
        self._compressed: torch.Tensor | None = None
        self._own: OwnProduct | None = None
        if plan.large == "cutlass":
            self._meta = metadata(blocks, 0)
        elif plan.large == "cusparselt":
            self._compressed = cusparselt.compress(self.dense())
        elif plan.large == "cusparselt-fp8":
            self._compressed = cusparselt.compress(self._fp8())
        elif plan.large in ("own", "own-fp8"):
            self._own = OwnProduct(library_for(blocks.bits.device), blocks, self.dtype)
            self._meta = self._own.meta

    def share(self, values: torch.Tensor, bitmask: torch.Tensor | None) -> None:
        """Read the stored tensors instead of copies of them, where they lie like blocks.

        Args:
            values, bitmask: what the matrix was made from, on its device.
        """
        mine = self.blocks
        as_stored = mine.value_bits == 16 or mine.value_type == "fp8"
        if bitmask is None or not mine.two_four or not as_stored:
            return
        if (values.shape, bitmask.shape) == (mine.values.shape, mine.bits.shape):
            self.blocks = replace(mine, values=values, bits=bitmask)
            self._shared = values.nbytes + bitmask.nbytes

    @property
    def build(self) -> str:
        """Which build of secateur's own library computes, if one does."""
        return "" if self._own is None else f" {self._own.library.build_key[:12]}"

    @property
    def nbytes(self) -> int:
        """Bytes on the device, of all layouts together, beside what is shared."""
        parts = (self._meta, self._compressed)
        own = self.blocks.nbytes - self._shared
        return own + sum(part.nbytes for part in parts if part is not None)

    def dense(self) -> torch.Tensor:
        """The dense weight ``[rows, columns]``, each value times its scale rounded once."""
        return self._unpacked(self.dtype)

    def _fp8(self) -> torch.Tensor:
        """The dense fp8 values ``[rows, columns]``, without their scales."""
        return self._unpacked(torch.uint8).view(torch.float8_e4m3fn)

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        from secateur.compile.gpu.triton_product import unpack

        with _on_device_of(self.blocks.bits):
            return unpack(self.blocks, dtype)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x [tokens, columns] @ W.T + bias``, by the back end that the plan names."""
        return self.multiply_with(self.plan.at(len(x)), x, bias)

    def multiply_with(
        self, end: BackEnd, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same by a back end of the plan."""
        if not len(x):
            return x.new_empty(0, self.weight.rows)
        x = x.contiguous()
        if end == "triton":
            from secateur.compile.gpu.triton_product import multiply

            with _on_device_of(x):
                return multiply(x, self.blocks, bias)
        if end == "unpack":
            return torch.nn.functional.linear(x, self.dense(), bias)
        with _on_device_of(x):
            if end in ("cusparselt-fp8", "scaled-mm"):
                return self._in_fp8(end, x, bias)
            if end in ("own", "own-fp8"):
                assert self._own is not None
                return self._own.multiply(self.blocks, x, bias)
            if end == "cusparselt":
                assert self._compressed is not None
                return cusparselt.product(self._compressed, x, bias)
            return self._by_cutlass(x, bias)

    def _in_fp8(self, end: BackEnd, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By torch's kernels for fp8, with x rounded to it."""
        assert self.blocks.scales is not None
        scales = self.blocks.scales[0, : self.weight.rows]
        if end == "scaled-mm":
            return fp8.scaled_product(self._fp8(), x, scales, bias)
        assert self._compressed is not None
        return fp8.sparse_product(self._compressed, x, scales, bias)

    def _by_cutlass(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By torch's CUTLASS: W is the left operand, its result the transposed one."""
        tokens, rows = len(x), self.weight.rows
        assert self._meta is not None
        values = self.blocks.values
        wide = 2 * values.shape[1] - self.weight.columns
        given = pad(x, (0, wide, 0, -tokens % _TOKENS)).t()
        result = torch._sparse_semi_structured_mm(values, self._meta, given)
        result = result.t()[:tokens, :rows]
        if bias is None:
            return result.contiguous()
        return torch.add(result, bias, out=x.new_empty(tokens, rows))


def _on_device_of(tensor: torch.Tensor) -> torch.cuda.device_of:
    """Make a tensor's device the current one, on which Triton starts kernels."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def hold(
    linear: Pieces, dtype: str, device: torch.device, round_inputs: bool = True
) -> GpuMatrix | str:
    """Bring a packed linear onto a GPU, and settle which kernel computes it when.

    Args:
        dtype: of its inputs: bf16, fp16 or another name.
        round_inputs: whether many tokens may be rounded to fp8, for fp8 values.

    Returns:
        The matrix, or why a dense copy should compute.

    Raises:
        UsageError: SECATEUR_CROSSOVER is not understood.
    """
    weight = weight_of(linear, dtype, round_inputs)
    there, wish = machine.read(device), crossover.wish()
    plan = choose(weight, there, wish if isinstance(wish, int) else None)
    if plan.large == "dense":
        assert plan.why is not None
        return plan.why
    matrix = GpuMatrix(weight, plan, make_blocks(linear).to(device))
    if wish == "measure" and device.type == "cuda":
        up_to = crossover.measured(matrix, device)
        if up_to is None:
            return "a dense copy was faster with 1 token when both were measured"
        matrix.plan = choose(weight, there, up_to, "measured")
    return matrix


def hold_each(
    values: Array,
    bitmask: Array,
    shape: tuple[int, int],
    pattern: Pattern,
    value_type: ValueType,
    *,
    scales: Array | None,
    group_size: int | None,
    device: torch.device,
) -> dict[BackEnd, GpuMatrix | str]:
    """A weight for each back end alone, or why that one cannot compute it: for comparing them.

    Args:
        values, bitmask, scales, group_size: as of `Pieces`; inputs are fp16 with fp16 values, else
            bf16.
    """
    kept = int(np.bitwise_count(bitmask).sum(dtype=np.int64)) * pattern.rows
    per_row = shape[1] * pattern.n // pattern.m if pattern.is_nm else None
    layer = PackedLayer(pattern=pattern, shape=shape, kept=kept, per_row=per_row)
    values = values if per_row is None or value_type == "int4" else values.reshape(-1, per_row)
    linear = pieces("weight", layer, bitmask, values, scales, value_type, group_size)
    there = machine.read(device)
    weight = weight_of(linear, "fp16" if value_type == "fp16" else "bf16")
    ends: tuple[BackEnd, ...] = ("triton", "unpack", *candidates(weight, there))
    if (why := obstacle(weight, there)) is not None:
        return dict.fromkeys(ends, why)
    blocks = make_blocks(linear).to(device)
    found: dict[BackEnd, GpuMatrix | str] = {}
    for end in ends:
        why = None if end in ("triton", "unpack") else refusal(end, weight, there)
        found[end] = why or GpuMatrix(weight, Plan(end, end), blocks)
    return found


def weight_of(linear: Pieces, dtype: str, round_inputs: bool = True) -> Weight:
    """What the rule wants to know of a packed linear."""
    layer = linear.layer
    rows, columns = layer.shape
    kept = layer.kept / (rows * columns)
    return Weight(rows, columns, layer.pattern, kept, linear.value_type, dtype, round_inputs)
