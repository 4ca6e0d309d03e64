"""Which back ends a GPU can use, and why not the others."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from secateur.compile.gpu.dispatch import BackEnd, Machine, Weight, choose
from secateur.pattern import Pattern
from secateur.recipe import ValueType


@lru_cache
def read(device: torch.device) -> Machine:
    """The facts of a GPU. Of a CPU that plays one: those of sm_80, with Triton interpreted."""
    absent: dict[BackEnd, str] = {}
    if (why := triton_obstacle()) is not None:
        absent["triton"] = why
    if device.type != "cuda":
        absent |= dict.fromkeys(("cutlass", "cusparselt"), "this is no GPU")
        return Machine((8, 0), absent)
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 8:
        major, minor = capability
        absent["cutlass"] = f"torch has it for compute capability 8.x, and this is {major}.{minor}"
    if not torch.backends.cusparselt.is_available():
        absent["cusparselt"] = f"torch {torch.__version__} was built without it"
    for end in ("cutlass", "cusparselt"):
        if end not in absent and (why := _trial(end, device)) is not None:
            absent[end] = why
    return Machine(capability, absent)


def diagnosis() -> dict[str, str]:
    """The back ends for packed linears on the current GPU, and the rule by examples, in words."""
    if not torch.cuda.is_available():
        return {"gpu kernels": f"no CUDA device; {triton_obstacle() or 'triton is installed'}"}
    there = read(torch.device("cuda", torch.cuda.current_device()))
    words: dict[str, str] = {}
    ends: tuple[BackEnd, ...] = ("triton", "cutlass", "cusparselt")
    for end in ends:
        absent = there.absent.get(end)
        words[f"gpu {end}"] = f"not used: {absent}" if absent else "can be used"
    examples: tuple[tuple[str, ValueType], ...] = (
        ("2:4", "bf16"),
        ("2:4", "int4"),
        ("50%", "bf16"),
    )
    for pattern, values in examples:
        example = Weight(4096, 4096, Pattern.parse(pattern), 0.5, values, "bf16")
        words[f"gpu {pattern} {values}"] = str(choose(example, there))
    return words


def triton_obstacle() -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed: `pip install secateur[gpu]`"
    return None


def _trial(end: BackEnd, device: torch.device) -> str | None:
    """Why a semi-structured product fails or is wrong on a device, or None.

    One small product: a library that is there may still refuse the device when it is called.
    """
    weight = torch.zeros(64, 128, dtype=torch.float16, device=device)
    weight[:, ::4], weight[:, 3::4] = 1, 2
    x = torch.ones(8, 128, dtype=torch.float16, device=device)
    made: Any = torch.sparse.SparseSemiStructuredTensorCUTLASS
    if end == "cusparselt":
        made = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    try:
        result = torch.nn.functional.linear(x, made.from_dense(weight))
    except (RuntimeError, NotImplementedError) as fault:
        return f"a trial product failed: {str(fault).splitlines()[0]}"
    if not torch.equal(result, torch.nn.functional.linear(x, weight)):
        return "a trial product was wrong"
    return None
