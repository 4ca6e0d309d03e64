"""A packed weight in the layout that this CPU runs fastest, and products with it.

    matrix = pack(values, bitmask, (rows, columns), Pattern.parse("2:4"), "bf16")
    y = matrix.matmul(x)                     # x float32 [tokens, columns] -> float32 [tokens, rows]
    q, k, v = matmul([wq, wk, wv], x)        # several that share their input, in one call

What lies where is in csrc/layout.h. A product with few tokens reads the packed bytes once, so it
takes the time that memory takes for them; with more tokens, sixteen rows at a time become floats in
the cache and every tile of tokens runs over them. Only the packed bytes are held.

Values fp32, bf16 and fp16 are multiplied with fp32 activations and summed in fp32. Values fp8
become one of these (`secateur.compile.nearest.widen_fp8`), and so take its memory and its time.
Values int8 and int4 take int8 activations (quantised on the fly, one scale for each token and group
of at most 64 columns; an infinite or NaN activation makes every output of its token NaN that keeps
a weight in its group), or fp32 activations if asked for; and with many tokens if the layout is one
of blocks, without AVX-512. Where only removed weights meet an infinite or
NaN activation, the output may be either: some layouts multiply stored zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from secateur.compile.nearest import widen_fp8
from secateur.errors import EnvironmentFault, ModelError, UsageError, did_you_mean
from secateur.pattern import Pattern

if TYPE_CHECKING:
    from secateur.recipe import ValueType

try:
    from secateur.compile import _kernels
except ImportError:  # installed without a C++ compiler
    _kernels = None  # type: ignore[assignment]

Values = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Floats = np.ndarray[Any, np.dtype[np.float32]]

_CARRIERS: dict[str, str] = {
    "fp32": "float32",
    "bf16": "uint16",
    "fp16": "uint16",
    "int8": "int8",
    "int4": "uint8",
}
# The largest densities at which a layout was measured to be faster than dense at one token: with
# no structure, and in blocks of R x 1.
_UNSTRUCTURED_PAYS = {"fp32": 0.6, "bf16": 0.55, "fp16": 0.55, "int8": 0.26, "int4": 0.16}
_BLOCKS_PAY = {
    "fp32": {4: 0.8, 8: 0.85, 16: 0.9},
    "bf16": {4: 0.7, 8: 0.8, 16: 0.85},
    "fp16": {4: 0.7, 8: 0.8, 16: 0.85},
    "int8": {4: 0.4, 8: 0.6, 16: 0.7},
    "int4": {4: 0.3, 8: 0.45, 16: 0.55},
}


@dataclass(frozen=True)
class _Layout:
    name: str
    kind: str
    window: int = 0
    keep: int = 0
    rest: bool = False


_DENSE = _Layout("dense", "dense")
_BITMASK = _Layout("bitmask", "bitmask")


class CpuMatrix:
    """A weight ``[rows, columns]`` in a CPU layout; make it with `pack`.

    Attributes:
        layout: ``dense``, ``2:4``, ``4:16``, ``8:16``, ``4x1``, ``8x1``, ``16x1``, ``bitmask``, or
            ``4:16+rest``.
        value_type: ``fp32``, ``bf16``, ``fp16``, ``int8`` or ``int4``.
        activations: ``fp32`` or ``int8``.
        why: why a sparse weight is stored dense, and how its values were made from fp8; or None.
    """

    def __init__(
        self, native: Any, layout: str, value_type: str, activations: str, why: str | None
    ) -> None:
        self._native = native
        self.layout, self.value_type = layout, value_type
        self.activations, self.why = activations, why

    @property
    def rows(self) -> int:
        """Outputs."""
        return int(self._native.rows)

    @property
    def columns(self) -> int:
        """Inputs."""
        return int(self._native.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the layout, everything included."""
        return int(self._native.nbytes)

    def rounds_inputs(self, tokens: int) -> bool:
        """Whether a product with so many tokens rounds its activations to int8.

        With ``activations`` int8 it does, except blocks of rows with more than 16 tokens where
        there is no AVX-512.
        """
        return self.activations == "int8" and bool(self._native.rounds_inputs(tokens))

    def matmul(self, x: Floats, bias: Floats | None = None, out: Floats | None = None) -> Floats:
        """``x Wᵀ + bias``.

        Args:
            x: float32 ``[tokens, columns]``, C-contiguous.
            bias: float32 ``[rows]``.
            out: float32 ``[tokens, rows]`` to write to.

        Raises:
            ValueError: a shape does not fit.
            TypeError: an array is of another type, or not contiguous.
        """
        if out is None:
            out = np.empty((len(x), self.rows), np.float32)
        self._native.multiply(x, out, bias, self.activations == "int8")
        return out

    def decode(self) -> Floats:
        """The dense weight as this layout holds it, float32 ``[rows, columns]``."""
        dense: Floats = self._native.decode()
        return dense

    def clone(self) -> CpuMatrix:
        """The same in other memory."""
        native = self._native.clone()
        return CpuMatrix(native, self.layout, self.value_type, self.activations, self.why)

    @property
    def facts(self) -> dict[str, Any]:
        """What `mapped` needs beside the streams; fit for JSON."""
        own = {"layout": self.layout, "activations": self.activations, "why": self.why}
        return {**own, "native": self._native.facts}

    @property
    def streams(self) -> dict[str, np.ndarray[Any, Any]]:
        """The memory of the layout: ``data`` uint8, ``starts`` int64; ``rest_data``, too."""
        return dict(self._native.streams)

    def __repr__(self) -> str:
        return (
            f"CpuMatrix({self.rows}x{self.columns}, {self.layout}, {self.value_type}, "
            f"{self.nbytes} bytes)"
        )


def pack(
    values: np.ndarray[Any, Any],
    bitmask: np.ndarray[Any, Any] | None,
    shape: tuple[int, int],
    pattern: Pattern,
    value_type: ValueType,
    *,
    scales: np.ndarray[Any, Any] | None = None,
    group_size: int | None = None,
    layout: str | None = None,
    activations: Literal["fp32", "int8"] | None = None,
) -> CpuMatrix:
    """Bring a packed weight, as docs/format.md describes it, into a layout of this CPU.

    Args:
        values: the kept weights row by row: float32, uint16 (the bits of bf16 or fp16), int8, or
            uint8 (int4: two in a byte, the first in the low nibble; fp8: the bits of e4m3fn).
        bitmask: uint8 ``[rows / R, ceil(columns / 8)]``; None: all weights are kept.
        shape: rows and columns.
        pattern: what the mask is; decides the layout.
        value_type: what the values are.
        scales: fp16 ``[rows, ceil(columns / group_size)]`` of int8 and int4; fp32 ``[rows, 1]`` of
            fp8.
        group_size: 32, 64 or 128 columns; of integers.
        layout: None chooses; "dense" stores zeros, too.
        activations: None: int8 for int8 and int4, else fp32.

    Raises:
        EnvironmentFault: the kernels are not built.
        ModelError: the parts contradict each other.
        UsageError: an unknown layout or activation type.
    """
    native = _native()
    if value_type == "fp8":
        assert scales is not None
        counts = _kept_of_rows(bitmask, shape)
        values, value_type, made = widen_fp8(values.reshape(-1), counts, scales)
        matrix = pack(
            values, bitmask, shape, pattern, value_type, layout=layout, activations=activations
        )
        matrix.why = f"{matrix.why}; {made}" if matrix.why else made
        return matrix
    rows, columns = shape
    integers = value_type in ("int8", "int4")
    activations = activations or ("int8" if integers else "fp32")
    if activations not in ("fp32", "int8") or (activations == "int8" and not integers):
        raise UsageError(
            f"activations {activations!r} do not go with values {value_type}",
            "use fp32; int8 activations go with int8 and int4 values",
        )
    carried = np.ascontiguousarray(values, dtype=np.dtype(_CARRIERS[value_type])).reshape(-1)
    block = pattern.rows
    bits = None if bitmask is None else np.ascontiguousarray(bitmask, np.uint8)
    count = rows * columns
    if bits is not None:
        count = int(np.bitwise_count(bits).sum()) * block
    chosen, why = _choose(pattern, value_type, shape, count / max(1, rows * columns))
    if layout is not None and layout != chosen.name:
        if layout not in ("dense", "bitmask", "4:16+rest"):
            raise UsageError(
                f"layout {layout!r} does not go with {pattern} and {value_type}",
                did_you_mean(layout, ["dense", "bitmask", "4:16+rest", chosen.name]),
            )
        rest = _Layout("4:16+rest", "nm", 16, 4, True)
        chosen, why = {"dense": _DENSE, "bitmask": _BITMASK, "4:16+rest": rest}[layout], None
    if chosen.rest and scales is not None and float(np.max(scales, initial=0)) * 127 > 65504:
        chosen, why = _DENSE, "its scales are too large for left-over weights in fp16"
    if chosen.kind == "dense" and bits is not None:
        carried = _with_zeros(carried, bits, block, shape, value_type)
        bits, block, count = None, 1, rows * columns
    try:
        packed = native.pack(
            rows=rows,
            columns=columns,
            type=value_type,
            values=carried.view(np.uint8),
            count=count,
            bits=None if bits is None else bits.reshape(-1),
            block=block,
            scales=None if scales is None else np.ascontiguousarray(scales).view(np.uint16),
            group=group_size or 0,
            kind=chosen.kind,
            window=chosen.window,
            keep=chosen.keep,
            rest=chosen.rest,
        )
    except ValueError as fault:
        raise ModelError(
            f"a weight {rows}x{columns} cannot be packed: {fault}",
            "write the model again with `secateur compile`",
        ) from fault
    return CpuMatrix(packed, chosen.name, value_type, activations, why)


def mapped(facts: dict[str, Any], streams: dict[str, np.ndarray[Any, Any]]) -> CpuMatrix:
    """A matrix on memory that holds its streams already, and is held by it.

    Args:
        facts: `CpuMatrix.facts` of an equal one.
        streams: its `CpuMatrix.streams`; uint8 ones begin at a multiple of 64 and have 64 bytes
            more. Their content is trusted.

    Raises:
        ValueError: the lengths are not those of the layout.
    """
    native = _native().map(**facts["native"], **streams)
    kind = facts["native"]["type"]
    return CpuMatrix(native, facts["layout"], kind, facts["activations"], facts["why"])


def checksum(data: np.ndarray[Any, Any]) -> int:
    """A number that changes when bytes do, as fast as memory gives them; uint8 [8 * n], aligned."""
    return int(_native().checksum(data))


def _choose(
    pattern: Pattern, value_type: str, shape: tuple[int, int], density: float
) -> tuple[_Layout, str | None]:
    """The layout of a pattern, and why it is dense if it is."""
    if pattern.is_dense:
        return _DENSE, None
    slow = f"with {value_type} values, dense is faster than {pattern} ({100 * density:.0f} % kept)"
    if pattern.rows > 1:
        if density > _BLOCKS_PAY[value_type][pattern.rows]:
            return _DENSE, slow
        return _Layout(f"{pattern.rows}x1", "vector"), None
    if pattern.is_nm:
        if (pattern.n, pattern.m) == (2, 4):
            return _Layout("2:4", "nm", 4, 2), None
        keep = pattern.n * (16 // pattern.m) if 16 % pattern.m == 0 else 16
        if keep <= 4:
            return _Layout("4:16", "nm", 16, 4), None
        if keep <= 8 and value_type != "int4":  # int4: as many bytes as dense
            return _Layout("8:16", "nm", 16, 8), None
    if density > _UNSTRUCTURED_PAYS[value_type]:
        return _DENSE, slow
    if value_type in ("int8", "int4"):
        if shape[1] > 65536:
            return _DENSE, f"{shape[1]} columns are too many for an unstructured layout"
        return _Layout("4:16+rest", "nm", 16, 4, True), None
    return _BITMASK, None


def _kept_of_rows(
    bitmask: np.ndarray[Any, Any] | None, shape: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """How many weights each row keeps, ``[rows]``."""
    rows, columns = shape
    if bitmask is None:
        return np.full(rows, columns)
    counts = np.bitwise_count(bitmask).sum(axis=1, dtype=np.int64)
    return np.repeat(counts, rows // len(bitmask))


def _with_zeros(
    values: np.ndarray[Any, Any],
    bits: np.ndarray[Any, Any],
    block: int,
    shape: tuple[int, int],
    value_type: str,
) -> np.ndarray[Any, Any]:
    """All weights, the removed ones 0, in the form of ``values``."""
    rows, columns = shape
    mask = np.unpackbits(bits.reshape(rows // block, -1), axis=1, count=columns, bitorder="little")
    mask = np.repeat(mask.astype(bool), block, axis=0)
    if value_type == "int4":
        nibbles = np.stack([values & 15, values >> 4], axis=1).reshape(-1)[: int(mask.sum())]
        dense = np.zeros(rows * columns + (rows * columns) % 2, np.uint8)
        dense[: rows * columns][mask.reshape(-1)] = nibbles
        return dense[0::2] | dense[1::2] << 4
    whole = np.zeros(shape, values.dtype)
    whole[mask] = values
    return whole.reshape(-1)


def matmul(
    matrices: Sequence[CpuMatrix],
    x: Floats,
    biases: Sequence[Floats | None] | None = None,
    outs: Sequence[Floats] | None = None,
) -> list[Floats]:
    """Products of several matrices with the same inputs, in one call.

    Args:
        matrices: of equal columns.
        x: float32 ``[tokens, columns]``, C-contiguous.
        biases: one for each matrix, or None.
        outs: float32 ``[tokens, rows]`` of each matrix, to write to.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an array is of another type, or not contiguous.
    """
    results = [np.empty((len(x), m.rows), np.float32) for m in matrices] if outs is None else outs
    _native().multiply_all(
        [matrix._native for matrix in matrices],
        x,
        list(results),
        [None] * len(matrices) if biases is None else list(biases),
        [matrix.activations == "int8" for matrix in matrices],
    )
    return list(results)


def set_threads(count: int, pin: bool = False) -> None:
    """How many threads a product uses, the caller included; ``pin`` binds each to one core."""
    if count < 1:
        raise UsageError(f"{count} threads", "use 1 or more")
    _native().set_threads(count, pin)


def threads() -> int:
    """How many threads a product uses."""
    return int(_native().threads())


def isa() -> str:
    """The instruction set in use: ``avx512``, ``avx2``, ``neon`` or ``plain``."""
    return str(_native().isa())


def isas() -> list[str]:
    """The instruction sets that this CPU can use, the best first."""
    return list(_native().isas())


def use_isa(name: str) -> None:
    """Use the kernels of another instruction set, for comparison.

    Raises:
        UsageError: this CPU cannot run it.
    """
    if name not in isas():
        raise UsageError(f"this CPU cannot run {name!r}", f"use one of {', '.join(isas())}")
    _native().use_isa(name)


def read_bandwidth(nbytes: int, rounds: int) -> list[float]:
    """GB/s of reading ``nbytes`` with the set threads, once per round."""
    return list(_native().read_bandwidth(nbytes, rounds))


def _native() -> Any:
    if _kernels is None:
        raise EnvironmentFault(
            "secateur's native kernels are not built",
            "install a C++ compiler and install secateur again",
        )
    return _kernels
