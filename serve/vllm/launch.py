"""``secateur serve DIR --engine vllm``: vLLM's own server, with what this machine needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from secateur.checkpoint import CONFIG, INDEX, read_json
from secateur.device import choose_device, choose_dtype
from secateur.errors import ModelError, UsageError
from secateur.layer_sizes import PER_LAYER
from secateur.serve.vllm import version

GIB = 2**30
_CACHE_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
_SMALL = 4  # cores; with more, vLLM's own processes get one of them


def run(
    directory: Path,
    *,
    host: str,
    port: int,
    api_key: str | None,
    threads: int | None,
    served_model_name: str,
    drain_seconds: float,
    arguments: Sequence[str],
) -> NoReturn:
    """Become vLLM's server; this process does not come back.

    Args:
        directory: a dense, pruned or packed model.
        host, port, api_key, threads, served_model_name, drain_seconds: see `secateur.serve.serve`.
        arguments: further arguments of ``vllm serve``; they win over what is chosen here.

    Raises:
        EnvironmentFault: vLLM is not installed, or not in a supported version.
        ModelError: there is no model, or a packed one is damaged.
    """
    found = version()
    _check(directory)
    command, variables = plan(directory, arguments, threads=threads)
    given = ["--host", host, "--port", str(port or _free_port(host))]
    given += ["--served-model-name", served_model_name]
    given += ["--shutdown-timeout", str(round(drain_seconds))]
    if api_key is not None:
        variables["VLLM_API_KEY"] = api_key  # not in the process list
    shown = [f"{name}={value}" for name, value in variables.items() if name != "VLLM_API_KEY"]
    words = " ".join([*shown, "vllm serve", str(directory), *given, *command])
    print(f"serve: vLLM {found}: {words}", file=sys.stderr, flush=True)
    module = [sys.executable, "-m", "secateur.serve.vllm", "serve", str(directory)]
    os.execve(sys.executable, [*module, *given, *command], os.environ | variables)


def plan(
    directory: Path, arguments: Sequence[str], *, threads: int | None = None
) -> tuple[list[str], dict[str, str]]:
    """The arguments and environment variables that this machine needs.

    Variables that are set already, and arguments that are given, are left as they are.

    Returns:
        The arguments with additions before them, and the variables to set.

    Raises:
        UsageError: more processes are asked for than there are cores.
    """
    from secateur.compile.values import dtype_of

    added: list[str] = []
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    device = choose_device("auto")
    if device.type == "cpu":
        if not _has(arguments, "--dtype"):
            stored = str(dtype_of(read_json(directory / CONFIG))).removeprefix("torch.")
            added += ["--dtype", choose_dtype("auto", device, stored)[0]]
        if not any(_has(arguments, option) for option in _CACHE_OPTIONS):
            variables["VLLM_CPU_KVCACHE_SPACE"] = str(_cache_gib())
        cores = sorted(os.sched_getaffinity(0))[:threads]
        if len(cores) <= _SMALL:
            variables["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        if threads is not None or _ranks(arguments) > 1:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = bind(cores, _ranks(arguments))
        # See `secateur.cli.main`: for the processes that vLLM starts.
        variables["GOMP_SPINCOUNT"] = "5000"
    unset = {name: value for name, value in variables.items() if name not in os.environ}
    return [*added, *arguments], unset


def bind(cores: Sequence[int], ranks: int) -> str:
    """Which cores each process computes on, as vLLM reads it: ``0,1|2,3``.

    Raises:
        UsageError: there are fewer cores than processes.
    """
    each = len(cores) // ranks
    if not each:
        raise UsageError(
            f"{ranks} processes for {len(cores)} cores",
            "use a smaller --tensor-parallel-size, or more --threads",
        )
    shares = [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def _check(directory: Path) -> None:
    """Refuse what is no model, what vLLM would misread, and packed models with wrong headers."""
    from secateur.compile.config import QUANT_METHOD
    from secateur.compile.packed import PackedModel
    from secateur.compile.sources import MASKS

    if (directory / MASKS).exists() and not (directory / INDEX).exists():
        raise ModelError(
            f"vLLM would take {MASKS} of {directory} for weights",
            "pack the model with `secateur compile`; with --format dense it stays as it is",
        )
    config = read_json(directory / CONFIG)
    if config.get(PER_LAYER):
        raise ModelError(
            f"the blocks of {directory} differ in size, and vLLM builds all alike",
            "use --engine native or transformers; for vLLM remove whole blocks (shortgpt, sleb), "
            "or the same part of each (llm-pruner with first=0 and last=0)",
        )
    method = config.get("quantization_config") or {}
    if method.get("quant_method") == QUANT_METHOD:
        PackedModel(directory)


def _value(arguments: Sequence[str], *names: str) -> str | None:
    """What an argument is given as, in ``--name value`` or ``--name=value``."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in names:
            return value if equals else next(iter(arguments[i + 1 : i + 2]), "")
    return None


def _has(arguments: Sequence[str], name: str) -> bool:
    return _value(arguments, name) is not None


def _ranks(arguments: Sequence[str]) -> int:
    """How many processes share the model on this machine."""
    tensor = _value(arguments, "--tensor-parallel-size", "-tp") or "1"
    pipeline = _value(arguments, "--pipeline-parallel-size", "-pp") or "1"
    return int(tensor) * int(pipeline) if (tensor + pipeline).isdigit() else 1


def _cache_gib() -> int:
    """A fourth of the memory that is free, 1 to 16 GiB."""
    import psutil

    free = psutil.virtual_memory().available
    return max(1, min(16, free // 4 // GIB))


def _free_port(host: str) -> int:
    """A port that is free now."""
    from secateur.serve.server import listen

    with listen(host, 0) as listener:
        number: int = listener.getsockname()[1]
        return number
