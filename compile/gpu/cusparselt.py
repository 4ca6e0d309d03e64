"""Products of 2:4 weights by cuSPARSELt, through torch, by the algorithm that was fastest.

cuSPARSELt has some twenty algorithms for a product, and the one that it takes unasked can be three
times as slow as the best: on an H100 115 us instead of 45 for a weight of 14336 x 4096 in bf16 and
64 tokens, and 788 instead of 427 for 4096 tokens. So it is asked once for each kind of weight and
each power of two of tokens which one is fastest. It times them, and its answer may differ from run
to run: with ``SECATEUR_CROSSOVER=built-in`` it is not asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from secateur.compile.gpu import crossover

_LEAST = 1024
"""Rows and columns of a weight for which it searches. With 256 x 512 a search ended in an illegal
instruction (torch 2.11, H100), after which a process cannot use its GPU any more."""
_Key = tuple[torch.device, torch.dtype, torch.Size, int, int]
_algorithms: dict[_Key, int] = {}


def compress(weight: torch.Tensor) -> torch.Tensor:
    """A 2:4 weight ``[rows, columns]``, bf16, fp16 or float8_e4m3fn, in the form of cuSPARSELt."""
    return torch._cslt_compress(weight)


def product(
    compressed: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x [tokens, columns] @ W.T + bias``.

    Args:
        compressed: of `compress`.
        x: of the weight's type.
        bias: ``[rows]``.
        out_dtype: of the result; None: x's.
    """
    tokens = len(x)
    more = -tokens % (16 // x.itemsize)
    given = (pad(x, (0, 0, 0, more)) if more else x).t()
    result = torch._cslt_sparse_mm(
        compressed,
        given,
        bias=bias,
        out_dtype=out_dtype,
        transpose_result=True,
        alg_id=_algorithm(compressed, given, out_dtype),
    )
    return result[:tokens].contiguous()


def _algorithm(compressed: torch.Tensor, given: torch.Tensor, out_dtype: torch.dtype | None) -> int:
    """The fastest algorithm, or cuSPARSELt's own choice where it must not search."""
    columns, tokens = given.shape
    rows = compressed.numel() * 16 // (9 * columns)  # its values and 1/8 of their number
    key = (given.device, given.dtype, compressed.shape, columns, (tokens - 1).bit_length())
    if key not in _algorithms:
        if min(rows, columns) < _LEAST or crossover.wish() == "built-in":
            return 0
        if given.is_cuda and torch.cuda.is_current_stream_capturing():
            return 0
        _algorithms[key] = _search(compressed, given, out_dtype)
    return _algorithms[key]


def _search(compressed: torch.Tensor, given: torch.Tensor, out_dtype: torch.dtype | None) -> int:
    search: Any = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is not None:
        return int(search(compressed, given, None, None, out_dtype, True)[0])
    return torch._cslt_sparse_mm_search(  # of older torch; newer ones call it deprecated
        compressed, given, out_dtype=out_dtype, transpose_result=True
    )
