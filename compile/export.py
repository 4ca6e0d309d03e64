"""The sparse forms of compressed-tensors as whole directories, for programs that still read them.

    compressed-tensors    sparse-24-bitmask if every pruned linear is 2:4, else sparse-bitmask; also
                          of fp8 or int8 values with a scale for each row
    marlin-24             int4 or int8 with a scale for each 128 inputs, or each row

``quantization_config`` is what compressed-tensors 0.13 wrote and vLLM read until 0.17. The linears
that it calls targets are all of the model's but those in its ``ignore`` lists.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from secateur.artifact import refuse_existing
from secateur.compile import compressed_tensors as bitmasks
from secateur.compile import marlin24
from secateur.compile.config import LIMITS
from secateur.compile.export_config import Era, Scales, marlin_config, scheme, sparse_config
from secateur.compile.export_directory import Export
from secateur.compile.pack import pack_model
from secateur.compile.quantize import Quantised, rtn
from secateur.compile.report import PackReport
from secateur.compile.sources import Source, open_source
from secateur.compile.values import DTYPES
from secateur.errors import ModelError, UsageError, did_you_mean
from secateur.recipe import Calibration, ValueType

_LARGEST: dict[ValueType, float] = {"fp8": 448.0, "int8": 127.0}


def write_compressed_tensors(
    model: str | Path,
    output: str | Path,
    *,
    values: ValueType | None = None,
    scales: Scales = "channel",
    era: Era = "0.9",
    overwrite: bool = False,
) -> PackReport:
    """Write a pruned or packed model, or an orphan, in a sparse form of compressed-tensors.

    Args:
        model: the directory. The integers and fp8 of a packed model become floats first, but for
            fp8 that stays fp8 with scales for rows, if the model's type has all of these.
        output: directory to make; it appears whole or not at all.
        values: fp32, bf16 or fp16: convert all floating-point weights; fp8 or int8: round the
            linears of the blocks to nearest, with scales of the model's type (activations are to be
            quantised by token, on the fly); None: leave the weights as they are.
        scales: of fp8 and int8: one for each row ("channel"), or one for all ("tensor").
        era: the oldest compressed-tensors that is to read it: "0.9" (and all later ones), or "0.8",
            which knew sparse-bitmask only, of every parameter, under other names.
        overwrite: replace an existing output.

    Raises:
        ModelError: the model is damaged, has no pruned linear, or a value does not fit.
        UsageError: the output exists, or the arguments do not go together.
    """
    known: tuple[ValueType, ...] = (*DTYPES, *_LARGEST)
    if values is not None and values not in known:
        raise UsageError(
            f"the format compressed-tensors has no values {values!r}", did_you_mean(values, known)
        )
    _check_choice("scales", scales, ("channel", "tensor"))
    _check_choice("era", era, ("0.9", "0.8"))
    if era == "0.8" and values in _LARGEST:
        raise UsageError(
            "compressed-tensors 0.8 read no quantised weights in a sparse form",
            "use --era 0.9, or --values bf16 or fp16",
        )
    refuse_existing(Path(output), overwrite)
    work = Export(open_source(model, packed=True), "compressed-tensors", values)
    two_of_four = all((p.n, p.m) == (2, 4) for p in work.source.patterns.values()) and era != "0.8"
    kind = "sparse-24-bitmask" if two_of_four else "sparse-bitmask"

    keeps = (values, work.source.values, scales) == ("fp8", "fp8", "channel") and all(
        _kept_fp8(work, name) for name in work.source.layers
    )

    def stored(tensor: str) -> dict[str, torch.Tensor]:
        name, weight = tensor.removesuffix(".weight"), work.load(tensor)
        linear = tensor.endswith(".weight") and name in work.source.layers
        beside: dict[str, torch.Tensor] = {}
        if era == "0.8":
            parts = bitmasks.encode_nonzero(weight)
            if linear and name in work.source.patterns:
                work.note(name, weight.nbytes, parts, int(parts[bitmasks.COMPRESSED].numel()))
            return {tensor + end: part for end, part in parts.items()}
        mask = None
        if linear and name in work.source.patterns:
            mask = work.source.mask(name, weight)
        if linear and values in _LARGEST:
            found = _kept_fp8(work, name) if keeps else None
            found = found or round_rows(tensor, weight, values, scales, work.named)
            weight, beside[".weight_scale"] = found
        if mask is None:
            return {tensor: weight} | {name + end: part for end, part in beside.items()}
        if two_of_four:
            parts = bitmasks.encode_two_of_four(weight, mask)
        else:
            parts = bitmasks.encode_nonzero(weight)
        kept = parts[bitmasks.COMPRESSED].numel()
        dense = weight.nbytes + sum(part.nbytes for part in beside.values())
        work.note(name, dense, parts | beside, kept)
        return {name + end: part for end, part in (parts | beside).items()}

    def config(ignored: list[str]) -> dict[str, Any]:
        quantised = scheme(values, scales) if values in _LARGEST else None
        everywhere = [name for name in ignored if name not in work.source.layers]
        sparsity = work.sparsity()
        return sparse_config(kind, era, sparsity, ignored, quantised, everywhere)

    recipe = {"values": values, "scales": scales if values in _LARGEST else None, "era": era}
    method = "kept" if keeps else "rtn"
    return work.write(Path(output), overwrite, recipe, stored, config, method)


def write_marlin24(
    model: str | Path,
    output: str | Path,
    *,
    values: ValueType | None = None,
    scales: Scales = "group",
    quantize: str = "gptq",
    calibration: Calibration | None = None,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> PackReport:
    """Write a 2:4 model as marlin-24.

    Linears that are not 2:4, or of a shape that the kernel did not take, stay dense; the report
    says which.

    Args:
        model: a pruned model; or one of int4 or int8 with a scale for each 128 inputs, packed or an
            orphan, whose integers are kept.
        output: directory to make; it appears whole or not at all.
        values: int4 or int8; None: those of the model.
        scales: one for 128 inputs ("group"), or one for each row ("channel", by rtn only).
        quantize, calibration, device, quiet: as of `pack_model`.
        overwrite: replace an existing output.

    Raises:
        ModelError: the model is damaged, or has no linear that fits.
        UsageError: the output exists, or the arguments do not go together.
    """
    _check_choice("scales", scales, ("group", "channel"))
    refuse_existing(Path(output), overwrite)
    source = open_source(model, packed=True)
    kind, bits = values or source.values, 4
    if kind == "int8":
        bits = 8
    elif kind != "int4":
        raise UsageError(
            f"the format marlin-24 has integers, not {values or 'the values of the model'}",
            "add --values int4 or int8",
        )
    staged = Path(f"{output}.integers")
    integers = source.values in ("int8", "int4")
    if scales == "channel" and (quantize == "gptq" or integers):
        raise UsageError(
            "one scale for each row is made by rounding the weights of a pruned model to nearest",
            "add --quantize rtn, or use --scales group",
        )
    if scales == "group" and (values or source.values) != source.values:
        options: dict[str, Any] = {"values": values, "group_size": marlin24.GROUP, "quiet": quiet}
        options |= {"quantize": quantize, "calibration": calibration, "device": device}
        pack_model(model, staged, overwrite=True, **options)
        source = open_source(staged, packed=True)
    else:
        quantize = "kept" if integers else "rtn"
    whole = source.values in ("int8", "int4")
    work, plain = Export(source, "marlin-24", values or source.values), open_source(model, True)
    skipped = {name: why for name in source.layers if (why := _no_marlin(source, name))}
    if skipped.keys() == source.layers.keys():
        name, why = next(iter(skipped.items()))
        raise ModelError(f"no linear fits marlin-24; {name}: {why}", "use --format packed")
    source.kept_dense |= skipped

    def stored(tensor: str) -> dict[str, torch.Tensor]:
        name = tensor.removesuffix(".weight")
        if not tensor.endswith(".weight") or name not in source.layers or name in skipped:
            return {tensor: work.load(tensor, plain)}
        found = (source.integers(name) if whole else None) or _by_row(work, tensor, bits)
        packed = marlin24.pack(found.values.numpy(), found.scales.numpy(), bits)
        arrays = {".weight_packed": packed.weight, ".meta": packed.meta}
        arrays[".scale_packed"] = packed.scales
        parts = {end: torch.from_numpy(array) for end, array in arrays.items()}
        dense = found.values.numel() * bits // 8 + found.scales.nbytes
        work.note(name, dense, parts, found.values.numel() // 2)
        return {name + end: part for end, part in parts.items()}

    def config(ignored: list[str]) -> dict[str, Any]:
        return marlin_config(bits, scales, sorted({*ignored, *skipped}))

    recipe = {"values": work.values, "scales": scales, "quantize": quantize}
    report = work.write(Path(output), overwrite, recipe, stored, config, quantize)
    shutil.rmtree(staged, ignore_errors=True)
    return report


def round_rows(
    tensor: str, weight: torch.Tensor, values: ValueType, scales: Scales, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to int8 or fp8 (e4m3), to nearest, ties to even.

    Args:
        tensor: its name, for errors.
        weight: ``[rows, columns]``.
        values: int8 or fp8.
        scales: "channel" or "tensor".
        dtype: of the scales; each is the smallest that clips nothing, or 1 if all is zero.

    Returns:
        ``[rows, columns]`` of int8 (-127 to 127) or fp8, and the scales, ``[rows, 1]`` or ``[1]``.

    Raises:
        ModelError: a scale does not fit its type.
    """
    wide, limit = weight.float(), _LARGEST[values]
    largest = (
        wide.abs().amax(dim=1, keepdim=True) if scales == "channel" else wide.abs().max()[None]
    )
    scale = (largest / limit).to(dtype)
    low = scale.double() * limit < largest.double()
    bits = scale.view(torch.int32 if dtype == torch.float32 else torch.int16)
    scale = torch.where(low, (bits + 1).view(dtype), scale)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    if not bool(scale.isfinite().all()) or not bool((scale > 0).all()):
        raise ModelError(
            f"tensor {tensor!r} has no scales in {dtype}", "use a model in bf16 or fp32"
        )
    rounded = (wide / scale.float()).clamp_(-limit, limit)
    if values == "int8":
        return rounded.round_().to(torch.int8), scale
    return rounded.to(torch.float8_e4m3fn), scale


def _kept_fp8(work: Export, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The fp8 of the source as `round_rows` gives it, if the model's type holds its scales."""
    found = work.source.integers(name)
    if found is None:
        return None
    scale = found.scales.to(work.named)
    return (found.values, scale) if torch.equal(scale.float(), found.scales) else None


def _check_choice(flag: str, chosen: str, choices: tuple[str, ...]) -> None:
    if chosen not in choices:
        raise UsageError(f"--{flag} {chosen!r} is not possible here", f"use {' or '.join(choices)}")


def _by_row(work: Export, tensor: str, bits: int) -> Quantised:
    """A linear rounded to nearest with one scale for each row."""
    weight = work.source.checkpoint.load(tensor).float()
    mask = work.source.mask(tensor.removesuffix(".weight"), weight)
    return rtn(weight, mask, LIMITS["int4" if bits == 4 else "int8"], weight.shape[1])


def _no_marlin(source: Source, name: str) -> str | None:
    """Why a linear has no form of marlin-24, or None."""
    pattern = source.patterns.get(name)
    if pattern is None or (pattern.n, pattern.m) != (2, 4):
        return source.kept_dense.get(name) or f"its pattern is {pattern}, not 2:4"
    if source.values in ("int8", "int4") and not source.decoded(name + ".weight"):
        return "it is not quantised"
    return marlin24.obstacle(*source.layers[name].shape)
