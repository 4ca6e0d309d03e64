"""Checkpoints in forms that lost their software, read one tensor at a time as if they were dense.

    P.compressed, P.bitmask, P.shape [, P.row_offsets]    `secateur.compile.compressed_tensors`
    P.weight_packed, P.scale_packed, P.meta               `secateur.compile.marlin24`
    P.B_24, P.s, P.B_meta                                 the same, of GPTQ checkpoints
    P.weight                                              plain, zeros and all

Each of the first and last may be fp8 or int8 with ``P.weight_scale`` (and ``P.weight_zero_point``)
beside it; the weight is then (q - zero point) x scale. Which form a linear has, its tensors say;
``config.json`` may be of any era. Every type, shape, count and bit is checked before use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.checkpoint import Checkpoint
from secateur.compile import compressed_tensors as bitmasks
from secateur.compile import marlin24
from secateur.compile.config import LIMITS
from secateur.compile.e4m3 import LARGEST_SCALE
from secateur.compile.quantize import Quantised
from secateur.errors import ModelError
from secateur.orphans import compression_of, recognise, without_compression

GROUP = marlin24.GROUP  # columns that share a scale, of the integers that are handed on
_MARLIN = {".weight_packed": (".meta", ".scale_packed"), ".B_24": (".B_meta", ".s")}
_SCALE, _ZERO = ".weight_scale", ".weight_zero_point"
_BESIDE = (_SCALE, _ZERO, ".weight_g_idx", ".weight_global_scale")
# Of activations, key-value caches and kernels: nothing that a weight needs.
_DROPPED = (
    *(".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point"),
    *(".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".weight_shape", ".workspace"),
)
_QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_GET_AGAIN = "get the checkpoint again"


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of the dense model: what it is stored as, by the end of names from ``base``."""

    base: str
    ends: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        return list(self.ends.values()) or [self.base]


@dataclass(frozen=True, slots=True)
class Scaled:
    """A weight as stored integers or fp8: (values - zeros) times scales.

    Attributes:
        values: int8 or fp8 ``[rows, columns]``.
        scales: of a float type, ``[a, b]``: a divides the rows and b the columns.
        zeros: fp32 of such a shape, or None.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """fp32 ``[rows, columns]``, each product rounded once."""
        values = self.values.float()
        if self.zeros is not None:
            values -= _widened(self.zeros, values.shape)
        return values * _widened(self.scales.float(), values.shape)


class OrphanCheckpoint(Checkpoint):
    """An orphaned checkpoint whose names and tensors are those of its dense model.

    Attributes:
        form: what it is, in words.
        config: without what it said of compression.
        quantised: whether weights are integers or fp8, with scales.
        dropped: names of tensors that no weight needs.
        notes: what was left out.

    Raises:
        ModelError: on opening, if tensors are missing or of a form that is not read here; on
            loading, if one is damaged. Both name the tensor.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._files = Checkpoint(path)  # the tensors as they are stored
        self.form = recognise(self._files) or "dense weights"
        compression = compression_of(self.config)
        if compression.get("transform_config"):
            raise ModelError(
                f"{path} applies rotations while it runs (transform_config), which no engine "
                "here does",
                "get an edition of the model without them",
            )
        self.config = without_compression(self.config)
        self._stored: dict[str, _Stored] = {}
        self.dropped = self._sort(set(self._files.names()))
        self.quantised = any(_is_quantised(stored) for stored in self._stored.values())
        self.notes: list[str] = []
        if self.dropped:
            count = len(self.dropped)
            self.notes.append(f"{count} scales and shapes of activations and kernels left out")
        if compression.get("kv_cache_scheme"):
            self.notes.append("the quantisation of the key-value cache is left out")

    def _sort(self, left: set[str]) -> list[str]:
        """Give every stored tensor to one of the dense model; returns those left out."""
        dropped = {name for name in left if name.endswith(_DROPPED)}
        left = left - dropped
        for name in sorted(left):
            base, end = _split(name, (bitmasks.BITMASK, *_MARLIN))
            if end == bitmasks.BITMASK and not base.endswith(_BESIDE):
                own = [*bitmasks.ENDS[:3]]
                own += [bitmasks.OFFSETS] if base + bitmasks.OFFSETS in left else []
                # Until 0.8.1 the base is the name of a parameter.
                old = base.endswith((".weight", ".bias"))
                self._claim(base if old else base + ".weight", base, own, left)
            elif end in _MARLIN and base + _MARLIN[end][0] in left:
                self._claim(base + ".weight", base, [end, *_MARLIN[end]], left)
        for name in sorted(left):
            base, end = _split(name, (".weight",))
            if end and base + _SCALE in left:
                self._claim(name, base, [".weight"], left)
        for name in sorted(left):
            if name in self._stored:
                raise ModelError(f"the checkpoint has tensor {name!r} in two forms", _GET_AGAIN)
            if name.endswith((*_BESIDE, *_MARLIN, *bitmasks.ENDS)):
                raise ModelError(
                    f"tensor {name!r} belongs to no weight of a form that is read here "
                    "(sparse-24-bitmask, sparse-bitmask, marlin-24, fp8 or int8 weights)",
                    _GET_AGAIN + ", or convert it with the program that wrote it",
                )
            self._stored[name] = _Stored(name)
        return sorted(dropped)

    def _claim(self, tensor: str, base: str, ends: list[str], left: set[str]) -> None:
        if tensor in self._stored:
            raise ModelError(f"the checkpoint has tensor {tensor!r} in two forms", _GET_AGAIN)
        ends += [end for end in (_SCALE, _ZERO) if base + end in left]
        for end in ends:
            if base + end not in left:
                raise ModelError(f"the checkpoint has no tensor {base + end!r}", _GET_AGAIN)
            left.remove(base + end)
        self._stored[tensor] = _Stored(base, {end: base + end for end in ends})

    def names(self) -> list[str]:
        """The names of all tensors of the dense model, sorted."""
        return sorted(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def stored_as(self, name: str) -> list[str]:
        """The names of the tensors that a tensor of the dense model is stored as."""
        return self._of(name).parts

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, or the first of its parts."""
        return self._files.file_of(self._of(name).parts[0])

    def nbytes(self, name: str) -> int:
        """The bytes that a tensor takes as it is stored."""
        return sum(self._files.nbytes(part) for part in self._of(name).parts)

    def load(self, name: str) -> torch.Tensor:
        """A tensor of the dense model; of quantised weights fp32, which rounds a product once."""
        stored = self._of(name)
        found = self.scaled(name)
        if found is not None:
            return found.dense()
        weight = self._decoded(stored) if stored.ends else self._files.load(name)
        if name.endswith(".weight") and weight.dtype in _QUANTISED:
            raise ModelError(f"tensor {name!r} is {weight.dtype}, but has no scale", _GET_AGAIN)
        return weight

    def decoded(self, name: str) -> bool:
        """Whether a tensor is stored as integers or fp8, and loaded as fp32."""
        return _is_quantised(self._of(name))

    def integers(self, name: str) -> Quantised | str:
        """A weight of integers or fp8 as a packed model holds it, if nothing has to be rounded.

        Returns:
            Values of -127 to 127 with a scale in fp16 for each 128 columns, or of e4m3fn with one
            in fp32 for each row; or why not.
        """
        found = self.scaled(name)
        assert found is not None
        if found.values.dtype != torch.int8:
            return _fp8(found)
        if found.zeros is not None and bool((found.zeros != 0).any()):
            return "its integers are not symmetric"
        if int(found.values.min()) < -LIMITS["int8"]:
            return "it holds -128, and packed integers reach from -127 to 127"
        scales, columns = found.scales.to(torch.float16), found.values.shape[1]
        if bool((scales.float() != found.scales.float()).any()) or bool((scales < 0).any()):
            return "its scales are no numbers of fp16"
        shared = columns // scales.shape[1]
        if scales.shape[1] > 1 and shared % GROUP:
            return f"each {shared} columns have a scale, which is no multiple of {GROUP}"
        wide = _widened(scales, found.values.shape)
        return Quantised(found.values, wide[:, ::GROUP].contiguous(), GROUP)

    def _of(self, name: str) -> _Stored:
        if name not in self._stored:
            raise ModelError(f"{self.path} has no tensor {name!r}", _GET_AGAIN)
        return self._stored[name]

    def _decoded(self, stored: _Stored) -> torch.Tensor:
        """The values as stored, without scales."""
        raw = {end: self._files.load(part) for end, part in stored.ends.items()}
        if ".weight" in raw:
            return raw[".weight"]
        return bitmasks.decode(stored.base, raw)

    def scaled(self, name: str) -> Scaled | None:
        """A weight's integers or fp8 with their scales; None if it has none."""
        stored = self._of(name)
        for end in _MARLIN:
            if end in stored.ends:
                return self._marlin(stored, end)
        if _SCALE not in stored.ends:
            return None
        values = self._decoded(stored)
        if values.dtype not in _QUANTISED or values.ndim != 2:
            raise ModelError(
                f"tensor {name!r} has a scale, but is a {values.dtype} of {values.ndim} axes and "
                "not an int8 or fp8 matrix",
                _GET_AGAIN,
            )
        if values.dtype != torch.int8 and bool(values.float().isnan().any()):
            raise ModelError(f"tensor {name!r} holds NaN", _GET_AGAIN)
        scales, zeros = (
            _matrix(stored.ends[end], self._files.load(stored.ends[end]), values.shape)
            if end in stored.ends
            else None
            for end in (_SCALE, _ZERO)
        )
        assert scales is not None
        return Scaled(values, scales, None if zeros is None else zeros.float())

    def _marlin(self, stored: _Stored, end: str) -> Scaled:
        ends = (end, *_MARLIN[end])
        weight, meta, scales = (_array(self._files.load(stored.ends[part])) for part in ends)
        packed = marlin24.Marlin24(weight, meta, scales)
        try:
            values, wide, _ = marlin24.unpack(packed, gptq=end == ".B_24")
        except ValueError as fault:
            what = f"tensor {stored.ends[end]!r} is damaged: {fault}"
            raise ModelError(what, _GET_AGAIN) from fault
        except ModelError as fault:
            what = f"tensor {stored.ends[_MARLIN[end][0]]!r}: {fault.what}"
            raise ModelError(what, _GET_AGAIN) from fault
        scaled = torch.from_numpy(values), torch.from_numpy(wide)
        return Scaled(scaled[0], _matrix(stored.ends[ends[2]], scaled[1], values.shape))


def _fp8(found: Scaled) -> Quantised | str:
    """A weight of fp8 with a scale for each row, or why it has no such form."""
    scales, columns = found.scales.float(), found.values.shape[1]
    if found.values.dtype != torch.float8_e4m3fn:
        return "its values are of e5m2, and packed fp8 is e4m3"
    if found.zeros is not None and bool((found.zeros != 0).any()):
        return "its values are not symmetric"
    if (count := scales.shape[1]) > 1:
        return f"each {columns // count} columns have a scale, and packed fp8 has one for a row"
    if bool((scales.to(found.scales.dtype) != found.scales).any()):
        return "its scales are no numbers of fp32"
    if bool(scales.signbit().any()) or float(scales.max()) > LARGEST_SCALE:
        return "its scales are negative or above 2^119"
    rows = found.values.shape[0] // scales.shape[0]
    return Quantised(found.values, scales.repeat_interleave(rows, dim=0), columns)


def _is_quantised(stored: _Stored) -> bool:
    return any(end in stored.ends for end in (_SCALE, *_MARLIN))


def _split(name: str, ends: tuple[str, ...]) -> tuple[str, str]:
    for end in ends:
        if name.endswith(end):
            return name.removesuffix(end), end
    return name, ""


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor in numpy; of bf16 and fp8, which numpy lacks, an array of another type."""
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        return np.empty(0)
    return tensor.numpy()


def _matrix(tensor: str, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Scales or zero points as a matrix whose extents divide those of the weight; all finite."""
    matrix = scales.reshape(1, 1) if scales.numel() == 1 else scales
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    fits = matrix.ndim == 2 and all(
        part > 0 and whole % part == 0 for part, whole in zip(matrix.shape, shape, strict=True)
    )
    if not fits or not (scales.is_floating_point() or tensor.endswith(_ZERO)):
        raise ModelError(
            f"tensor {tensor!r} is {scales.dtype} of shape {tuple(scales.shape)}, which does not "
            f"fit a weight of shape {tuple(shape)}",
            _GET_AGAIN,
        )
    if not bool(matrix.float().isfinite().all()):
        raise ModelError(f"tensor {tensor!r} holds NaN or infinity", _GET_AGAIN)
    return matrix


def _widened(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Scales repeated to the shape of the weight."""
    wide = scales.repeat_interleave(shape[0] // scales.shape[0], dim=0)
    return wide.repeat_interleave(shape[1] // scales.shape[1], dim=1)
