"""A pruning chain on one linear layer outside any model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from secateur.checkpoint import save_tensors
from secateur.errors import ModelError, UsageError
from secateur.pattern import Pattern
from secateur.prune.method import Method, Problem, Solution
from secateur.prune.methods import find_method, gradient_norm
from secateur.statistics import GradientNorms, GradientStatistics, InputStatistics

if TYPE_CHECKING:
    import torch

_AXES = {
    "weight": "[out, in]",
    "activations": "[sequences, tokens, in]",
    "grads_per_sample": "[sequences, out, in]",
}


class LayerResult(BaseModel):
    """What `prune_layer` did.

    Attributes:
        method: the chain.
        shape: ``(out, in)``.
        sparsity: fraction of the weights that the mask removes.
        relative_error: ‖(W - Ŵ)X‖² / ‖WX‖²; None without activations.
        facts: counts of anything unusual, by step.
    """

    method: str
    pattern: str
    compat: str
    shape: tuple[int, int]
    sparsity: float
    relative_error: float | None
    facts: dict[str, Any]
    output: str | None


def prune_layer(
    source: str | Path,
    output: str | Path | None,
    method: str,
    pattern: str | Pattern,
    *,
    compat: Literal["exact", "reference"] = "exact",
    settings: Mapping[str, Any] | None = None,
) -> LayerResult:
    """Prune one linear layer that is stored with its inputs.

    Args:
        source: safetensors file with ``weight`` [out, in], ``activations``
            [sequences, tokens, in], which are fed one sequence at a time, and for methods that
            read gradients ``grads_per_sample`` [sequences, out, in].
        output: file to write, with ``weight_out`` [out, in] and ``mask_pruned`` [out, in] (bool,
            True = removed); None: write nothing.
        method: a chain, see `secateur.prune.find_method`.
        settings: of its steps, e.g. ``{"dsnot.cycles": 50}``.

    Raises:
        UsageError: an unknown method or setting, a pattern that does not fit, no place to write.
        ModelError: tensors that are missing or do not fit each other.
    """
    chain, wanted = find_method(method, settings), Pattern.parse(str(pattern))
    if chain.regional is not None or "regional" in chain.needs:
        raise UsageError(
            f"{chain.name!r} needs a whole decoder block, not a single layer",
            "leave out +blockwise; instead of wandapp use gblm",
        )
    if output is not None and not Path(output).resolve().parent.is_dir():
        raise UsageError(
            f"there is no directory {Path(output).parent} to write to",
            "make it first, or change -o",
        )
    tensors = _read(Path(source), chain)
    weight = tensors["weight"].float()
    rows, columns = weight.shape
    if (why := wanted.obstacle(rows, columns)) is not None:
        raise UsageError(f"{wanted} does not fit the weight: {why}", "choose another pattern")
    inputs = _statistics(tensors, chain)
    gradients = _gradients(tensors, chain, compat)
    problem = Problem(weight, inputs, wanted, compat, gradients)
    solution = _dense(weight) if wanted.is_dense else chain.solve(problem)
    if output is not None:
        found = {"weight_out": solution.weight, "mask_pruned": ~solution.mask}
        save_tensors(Path(output), found)
    return LayerResult(
        method=chain.name,
        pattern=str(wanted),
        compat=compat,
        shape=(rows, columns),
        sparsity=1 - float(solution.mask.double().mean()),
        relative_error=inputs.relative_error(weight, solution.weight) if inputs else None,
        facts=solution.facts,
        output=None if output is None else str(output),
    )


def _dense(weight: torch.Tensor) -> Solution:
    import torch

    return Solution(torch.ones_like(weight, dtype=torch.bool), weight)


def _read(source: Path, chain: Method) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not source.is_file():
        raise ModelError(f"there is no file {source}", "give a safetensors file")
    try:
        tensors = load_file(source)
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{source} cannot be read: {fault}", "give a safetensors file") from fault
    needed = ["weight"]
    if chain.needs_text:
        needed.append("activations")
    if "gradients" in chain.needs:
        needed.append("grads_per_sample")
    for name in needed:
        if name not in tensors:
            raise ModelError(
                f"{source} has no tensor {name!r}, which the method {chain.name!r} needs",
                f"add it, {_AXES[name]}; it holds: {', '.join(sorted(tensors))}",
            )
    _check(source, {name: tensors[name] for name in _AXES if name in tensors})
    return tensors


def _check(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse shapes that do not fit and values that are not finite."""
    for name, tensor in tensors.items():
        if tensor.ndim != _AXES[name].count(",") + 1 or 0 in tensor.shape:
            raise ModelError(
                f"{source}: {name!r} has the shape {list(tensor.shape)}",
                f"it must be {_AXES[name]}",
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ModelError(
                f"{source}: {name!r} holds NaN, infinite or whole numbers ({tensor.dtype})",
                "store finite floating-point values",
            )
    out, width = tensors["weight"].shape
    fits = {"activations": (width,), "grads_per_sample": (out, width)}
    for name, end in fits.items():
        if name in tensors and tuple(tensors[name].shape[-len(end) :]) != end:
            raise ModelError(
                f"{source}: {name!r} {list(tensors[name].shape)} does not fit the weight "
                f"[{out}, {width}]",
                f"it must be {_AXES[name]}",
            )


def _statistics(tensors: dict[str, torch.Tensor], chain: Method) -> InputStatistics | None:
    if "activations" not in tensors:
        return None
    activations = tensors["activations"]
    sequences, _, width = activations.shape
    # The error is reported exactly, whether or not the method reads the Gram matrix.
    inputs = InputStatistics(width, sequences, activations.device, chain.needs | {"norms", "gram"})
    for sequence in activations:
        inputs.update(sequence[None])
    return inputs


def _gradients(
    tensors: dict[str, torch.Tensor], chain: Method, compat: str
) -> GradientNorms | None:
    norm = gradient_norm(chain)
    if norm is None:
        return None
    gradients = GradientStatistics(norm, half=compat == "reference")
    for gradient in tensors["grads_per_sample"]:
        gradients.update(gradient)
    return gradients.result()
