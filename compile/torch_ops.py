"""Packed weights as a torch op, so that torch can trace a model that computes with them.

    held = HeldMatrix(pack(...))
    y = linear(x, held.handle, bias)     # x [..., columns] → [..., rows], of x's type

`linear` is ``torch.ops.secateur.linear``: x and bias are float32, bfloat16 or float16, on the CPU.
The weight is named by a number, good as long as its `HeldMatrix` lives; a call with another number,
or with inputs of another width, is refused. The number means nothing in another process.

The op is registered from C++ (csrc/torch_ops.cpp, on torch's stable ABI), because the way through a
Python function costs as much as a small product. Where that library is missing, `OBSTACLE` says
why, and the op is made here in Python. It has no gradient.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import torch

from secateur.compile.cpu import CpuMatrix

try:
    from secateur.compile import _kernels
except ImportError:  # installed without a C++ compiler
    _kernels = None  # type: ignore[assignment]

BUILT = _kernels is not None
"""Whether there are kernels at all; without them there is no op."""

_SCHEMA = "(Tensor x, int handle, Tensor? bias=None) -> Tensor"


class HeldMatrix:
    """A matrix that `linear` can be given by its number.

    Attributes:
        matrix: the weight.
        handle: its number, more than 0.
    """

    def __init__(self, matrix: CpuMatrix) -> None:
        self.matrix = matrix
        self.handle: int = _kernels.hold(matrix._native, matrix.activations == "int8")
        weakref.finalize(self, _kernels.release, self.handle)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`linear` with this matrix."""
        product: torch.Tensor = linear(x, self.handle, bias)
        return product

    def dense(self) -> torch.Tensor:
        """The dense weight, float32 ``[rows, columns]``."""
        return torch.from_numpy(self.matrix.decode())


def _shape(x: torch.Tensor, handle: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What `linear` returns, without its numbers."""
    matrix, _ = _kernels.held(handle)
    torch._check(x.shape[-1] == matrix.columns)  # type: ignore[no-untyped-call]
    return x.new_empty((*x.shape[:-1], matrix.rows))


def _multiply(x: torch.Tensor, handle: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear`, where the C++ op is missing."""
    matrix, int8 = _kernels.held(handle)
    tokens = x.numel() // max(1, x.shape[-1])
    flat = x.detach().reshape(tokens, x.shape[-1]).float().contiguous()
    out = torch.empty((tokens, matrix.rows))
    added = None if bias is None else bias.detach().float().contiguous().numpy()
    matrix.multiply(flat.numpy(), out.numpy(), added, int8)
    return out.to(x.dtype).reshape(*x.shape[:-1], matrix.rows)


def _library() -> Path:
    """Where the C++ op is, if it is."""
    return Path(_kernels.__file__).with_name("_torch_ops.so")


def _register() -> str | None:
    """Make the op; why it is one in Python, or None."""
    if _kernels is None:
        return "the native module is not built"
    why = None
    library = _library()
    if not library.exists():
        why = (
            "it was built where torch was not importable (build isolation), or was older than 2.10"
        )
    else:
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            connect: Any = ctypes.CDLL(str(library)).secateur_connect
            connect.argtypes = [ctypes.c_void_p]
            if not connect(_kernels.table()):
                why = "it was built from another version of the kernels"
        except OSError as fault:
            why = f"torch {torch.__version__} cannot load it: {fault}"
    if why is not None:
        torch.library.define("secateur::linear", _SCHEMA)
        torch.library.impl("secateur::linear", "cpu", _multiply)
    torch.library.register_fake("secateur::linear", _shape)
    return why


def _linear_in_python(
    x: torch.Tensor, handle: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Past the dispatcher, unless torch is tracing."""
    if torch.compiler.is_compiling():
        traced: torch.Tensor = torch.ops.secateur.linear.default(x, handle, bias)
        return traced
    return _multiply(x, handle, bias)


def follow_torch_threads() -> None:
    """Let products use as many threads as torch does."""
    if _kernels.threads() != torch.get_num_threads():
        _kernels.set_threads(torch.get_num_threads(), False)


def borrow_torch_threads() -> None:
    """Let products run in torch's own threads, until `secateur.compile.cpu.set_threads`.

    For a process in which torch's threads are bound to processors: ours would share the one of the
    thread that makes them. Where the C++ op is missing, ours are used, as many as torch's.
    """
    if OBSTACLE is None:
        ctypes.CDLL(str(_library())).secateur_lend_threads()
    else:
        follow_torch_threads()


OBSTACLE = _register()
"""Why `linear` is not the C++ op; None if it is."""

linear: Any = _linear_in_python if OBSTACLE else torch.ops.secateur.linear.default
