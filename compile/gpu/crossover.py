"""Up to how many tokens Triton computes: as built in, as given, or measured on the GPU at load.

    SECATEUR_CROSSOVER=measure   the default: measured once for each kind of weight, and kept
    SECATEUR_CROSSOVER=built-in  `dispatch.CROSSOVER`
    SECATEUR_CROSSOVER=96        up to 96 tokens

Kernels add in different orders, so logits may differ in their last bits with the crossover: fix it
where results must be reproducible between machines. What was measured is kept in
``$SECATEUR_CACHE/crossover.json`` (``~/.cache/secateur`` without that variable), by device,
versions, shape and type.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

import secateur
from secateur.compile.gpu.dispatch import BackEnd, Plan
from secateur.errors import UsageError
from secateur.source import cache_directory

if TYPE_CHECKING:
    from secateur.compile.gpu.held import GpuMatrix

VARIABLE = "SECATEUR_CROSSOVER"
TOKENS = (1, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of tokens that are timed."""

_SCHEMA = "secateur/crossover/1"


def wish() -> int | Literal["measure", "built-in"]:
    """What the environment asks for.

    Raises:
        UsageError: it is not understood.
    """
    text = os.environ.get(VARIABLE) or "measure"
    if text in ("measure", "built-in"):
        return text  # type: ignore[return-value]
    if text.isascii() and text.isdigit():
        return int(text)
    raise UsageError(
        f"{VARIABLE}={text!r} is not understood", "write measure, built-in or a number of tokens"
    )


def crossover_of(times: Mapping[int, Mapping[BackEnd, float]], plan: Plan) -> int | None:
    """Up to how many tokens the plan's first kernel was never the slower one.

    Args:
        times: of each back end, by tokens; of "dense" with one token only.

    Returns:
        A number of tokens or 0; None where a dense copy was faster with one token: then the kernel
        does not pay where it is meant to.
    """
    if times[1]["dense"] < min(times[1][plan.small], times[1][plan.large]):
        return None
    best = 0
    for tokens, by_end in sorted(times.items()):
        if by_end[plan.small] > by_end[plan.large]:
            break
        best = tokens
    return best


def time_plan(
    plan: Plan, milliseconds: Callable[[BackEnd, int], float]
) -> dict[int, dict[BackEnd, float]]:
    """Time the back ends of a plan until the one for few tokens has lost.

    Args:
        milliseconds: of a product by a back end with so many tokens.
    """
    times: dict[int, dict[BackEnd, float]] = {}
    for tokens in TOKENS:
        ends = (plan.small, plan.large, *(("dense",) if tokens == 1 else ()))
        times[tokens] = {end: milliseconds(end, tokens) for end in ends}
        if times[tokens][plan.small] > times[tokens][plan.large]:
            break
    return times


def measured(matrix: GpuMatrix, device: torch.device) -> int | None:
    """`crossover_of` a matrix on a GPU, from the file if it was measured before."""
    file, key = cache_file(), _key(matrix, device)
    known = read_cache(file)
    if key not in known:
        with torch.cuda.device(device):
            times = time_plan(matrix.plan, _timer(matrix, device))
        known[key] = crossover_of(times, matrix.plan)
        write_cache(file, known)
    return known[key]


def cache_file() -> Path:
    """Where measured crossovers are kept."""
    return cache_directory() / "crossover.json"


def read_cache(file: Path) -> dict[str, int | None]:
    """What was measured before; nothing, if the file is absent or not one of ours."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
        return {}
    tokens = content.get("tokens")
    if not isinstance(tokens, dict):
        return {}
    return {key: value for key, value in tokens.items() if value in (None, 0, *TOKENS)}


def write_cache(file: Path, known: Mapping[str, int | None]) -> None:
    """Replace the file at once; a directory that cannot be written to is no fault."""
    text = json.dumps({"schema": _SCHEMA, "tokens": dict(sorted(known.items()))}, indent=1)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


def _key(matrix: GpuMatrix, device: torch.device) -> str:
    import triton

    parts = (
        torch.cuda.get_device_name(device),
        f"secateur {secateur.__version__}, torch {torch.__version__}, triton {triton.__version__}",
        f"{matrix.weight}, {100 * matrix.weight.kept:.0f} % kept, inputs {matrix.weight.dtype}",
        matrix.plan.large + matrix.build,
    )
    return " | ".join(parts)


def _timer(matrix: GpuMatrix, device: torch.device) -> Callable[[BackEnd, int], float]:
    """Times products with caches emptied between calls: a layer finds none of its weight there."""
    from triton.testing import do_bench

    x = torch.randn(max(TOKENS), matrix.weight.columns, device=device).to(matrix.dtype)
    dense = matrix.dense()

    def milliseconds(end: BackEnd, tokens: int) -> float:
        given = x[:tokens]

        def call() -> torch.Tensor:
            if end == "dense":
                return torch.nn.functional.linear(given, dense)
            return matrix.multiply_with(end, given)

        return float(do_bench(call, warmup=5, rep=20, return_mode="median"))

    return milliseconds
