"""``quantization_config`` as compressed-tensors wrote it beside its sparse forms."""

from __future__ import annotations

from typing import Any, Literal

Era = Literal["0.9", "0.8"]
Scales = Literal["channel", "tensor", "group"]

# The last release of each era.
_VERSIONS: dict[Era, str] = {"0.9": "0.13.0", "0.8": "0.8.1"}


def sparse_config(
    kind: str,
    era: Era,
    sparsity: float,
    ignored: list[str],
    quantised: dict[str, Any] | None,
    not_quantised: list[str],
) -> dict[str, Any]:
    """Of a sparse checkpoint.

    Args:
        kind: sparse-24-bitmask or sparse-bitmask.
        era: the oldest release that is to read it.
        sparsity: fraction of the linears' weights that are removed.
        ignored: the linears that are stored dense.
        quantised: of `scheme`, or None.
        not_quantised: the linears that have no scale.
    """
    described: dict[str, Any] = {
        "format": kind,
        "targets": None if era == "0.8" else ["Linear"],
        "ignore": None if era == "0.8" else ignored,
        "global_sparsity": sparsity,
        "sparsity_structure": "2:4" if kind == "sparse-24-bitmask" else "unstructured",
    }
    config = {"quant_method": "compressed-tensors", "version": _VERSIONS[era]}
    if quantised is not None:
        form = "float-quantized" if quantised["weights"]["type"] == "float" else "int-quantized"
        config |= _quantization(form, quantised, not_quantised)
    return config | {"sparsity_config": described}


def scheme(values: str | None, scales: Scales) -> dict[str, Any]:
    """8-bit weights with a scale for each row or one for all; 8-bit activations, by token."""
    kind = "float" if values == "fp8" else "int"
    return {
        "targets": ["Linear"],
        "weights": _arguments(8, kind, scales),
        "input_activations": _arguments(8, kind, "token", dynamic=True),
        "output_activations": None,
    }


def marlin_config(bits: int, scales: Scales, ignored: list[str]) -> dict[str, Any]:
    """Of a marlin-24 checkpoint, without ``sparsity_config``: old readers refuse an empty one."""
    weights = _arguments(bits, "int", scales, group_size=128 if scales == "group" else None)
    one = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    config = {"quant_method": "compressed-tensors", "version": _VERSIONS["0.9"]}
    return config | _quantization("marlin-24", one, ignored)


def _quantization(form: str, group: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "quantization_status": "compressed",
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _arguments(
    bits: int, kind: str, strategy: str, *, dynamic: bool = False, group_size: int | None = None
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
        "observer": None if dynamic else "minmax",
    }
