"""Where to compute, and in which type: one rule for all stages."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import EnvironmentFault, UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def choose_device(device: str) -> torch.device:
    """The device of a flag: 'auto' is CUDA where there is one.

    Raises:
        UsageError: no device has this name.
        EnvironmentFault: CUDA is asked for and absent.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"there is no device {device!r}", "use auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentFault("this machine has no CUDA device", "use --device cpu")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device, stored: str = "bfloat16") -> tuple[str, str]:
    """The type to compute in, and why if that is not obvious.

    Args:
        dtype: one of `DTYPES`, or "auto": the checkpoint's own, unless the device would have to
            emulate it (16-bit matrix products on most CPUs, several times slower than float32).
        device: where to compute.
        stored: the checkpoint's own type.

    Raises:
        UsageError: the type is not known.
    """
    if dtype in DTYPES:
        return dtype, ""
    if dtype != "auto":
        raise UsageError(f"unknown dtype {dtype!r}", did_you_mean(dtype, ("auto", *DTYPES)))
    if stored == "float32":
        return stored, ""
    if device.type == "cuda":
        return stored, f"computed in {stored}, the default on CUDA"
    if stored == "bfloat16" and _BF16_FLAGS & set(cpu_facts().get("flags", "").split()):
        return stored, "computed in bfloat16: this CPU multiplies it in hardware"
    return "float32", (
        f"computed in float32: this CPU has no fast {stored} arithmetic (AVX512-BF16 or AMX)"
    )


def cpu_facts() -> dict[str, str]:
    """The first processor's entries in ``/proc/cpuinfo``; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def cpu_name() -> str:
    """The name of the processor."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def return_free_memory() -> None:
    """Hand freed memory back to the system, where the C library would keep it (glibc).

    Between tensors that stay, the holes of those that went are not always filled again: without
    this a process that works block by block grows from block to block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
