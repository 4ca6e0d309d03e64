"""compile: store what is left of a pruned model in a form that is smaller and quick to run.

The names below are imported when they are first asked for: most need torch, which a process that
only runs the kernels (`secateur.compile.cpu`) does without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.compile.dense import write_dense
    from secateur.compile.export import write_compressed_tensors, write_marlin24
    from secateur.compile.formats import FORMATS, Format
    from secateur.compile.onnx.write import write_onnx
    from secateur.compile.pack import pack_model
    from secateur.compile.packed import PackedModel, read_packed
    from secateur.compile.report import LayerReport, PackReport
    from secateur.compile.stored import Pieces

__all__ = ["FORMATS", "Format", "LayerReport", "PackReport", "PackedModel", "Pieces"]
__all__ += ["pack_model", "read_packed", "write_compressed_tensors", "write_dense"]
__all__ += ["write_marlin24", "write_onnx"]

_HOMES = {
    "FORMATS": "formats",
    "Format": "formats",
    "LayerReport": "report",
    "PackReport": "report",
    "PackedModel": "packed",
    "Pieces": "stored",
    "pack_model": "pack",
    "read_packed": "packed",
    "write_compressed_tensors": "export",
    "write_dense": "dense",
    "write_marlin24": "export",
    "write_onnx": "onnx.write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
