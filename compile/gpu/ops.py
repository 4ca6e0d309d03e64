"""Products with packed weights on a GPU as a torch op, so that torch can trace models with them.

    held = HeldGpuMatrix(hold(pieces, "bf16", device))
    y = linear(x, held.handle, bias)     # x [..., columns] → [..., rows], of x's type

`linear` is ``torch.ops.secateur.gpu_linear``. As of `secateur.compile.torch_ops`, the weight is
named by a number, good as long as its `HeldGpuMatrix` lives and in this process. Which back end
computes is settled inside the op, by its number of tokens: a traced graph serves all of them. The
op has no gradient.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from secateur.compile.gpu.held import GpuMatrix

_numbers = itertools.count(1)
_matrices: dict[int, GpuMatrix] = {}


class HeldGpuMatrix:
    """A matrix that `linear` can be given by its number.

    Attributes:
        matrix: the weight.
        handle: its number, more than 0.
    """

    def __init__(self, matrix: GpuMatrix) -> None:
        self.matrix = matrix
        self.handle = next(_numbers)
        _matrices[self.handle] = matrix
        weakref.finalize(self, _matrices.pop, self.handle)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`linear` with this matrix."""
        product: torch.Tensor = linear(x, self.handle, bias)
        return product

    def dense(self) -> torch.Tensor:
        """The dense weight ``[rows, columns]``, on the device."""
        return self.matrix.dense()


def _checked(x: torch.Tensor, handle: int) -> GpuMatrix:
    matrix = _matrices.get(handle)
    if matrix is None:
        raise RuntimeError(f"secateur::gpu_linear: there is no matrix {handle}")
    columns = matrix.weight.columns
    torch._check(  # type: ignore[no-untyped-call]
        x.shape[-1] == columns,
        lambda: f"secateur::gpu_linear takes inputs of {columns} columns, not {x.shape[-1]}",
    )
    if x.dtype != matrix.dtype:
        raise RuntimeError(f"secateur::gpu_linear takes {matrix.dtype} here, not {x.dtype}")
    return matrix


@torch.library.custom_op("secateur::gpu_linear", mutates_args=())
def _linear(x: torch.Tensor, handle: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    matrix = _checked(x, handle)
    y = matrix.multiply(x.reshape(-1, x.shape[-1]), bias)
    return y.reshape(*x.shape[:-1], matrix.weight.rows)


@_linear.register_fake
def _(x: torch.Tensor, handle: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _checked(x, handle).weight.rows))


linear: Any = torch.ops.secateur.gpu_linear.default
