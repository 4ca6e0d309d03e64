"""What writing and running ONNX takes, and what is there."""

from __future__ import annotations

from importlib.util import find_spec

from secateur.errors import EnvironmentFault


def require(*packages: str) -> None:
    """Refuse to go on without packages of the extra ``onnx``.

    Raises:
        EnvironmentFault: one is missing.
    """
    for package in packages:
        if find_spec(package) is None:
            raise EnvironmentFault(
                f"ONNX needs {package}, which is not installed", "pip install 'secateur[onnx]'"
            )


def providers() -> str:
    """The execution providers of the installed ONNX Runtime, in one line."""
    if find_spec("onnxruntime") is None:
        return "not installed: --engine onnx needs `secateur[onnx]`"
    import onnxruntime

    names = ", ".join(
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    )
    return f"ONNX Runtime {onnxruntime.__version__}: {names}"
