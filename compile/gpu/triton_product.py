"""Products with `Blocks` through the Triton kernels: how they are launched.

Not yet measured on a GPU: the numbers of programs and warps here follow from counting bytes and
instructions, not from timing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from secateur.compile.gpu import triton_kernels
from secateur.compile.gpu.blocks import Blocks

INTERPRETED: bool = triton_kernels.INTERPRETED.value
"""Whether the kernels run in Python, on CPU tensors (TRITON_INTERPRET=1)."""

_TOKEN_TILES = (16, 32, 64)
_PROGRAMS_PER_SM = 8  # with two to four warps each, so that loads of some hide the work of others
_LEAST_BLOCKS = 4  # of a program: fewer do not repay its start
_ADDED = 1024  # elements that one program of `add_parts` adds
STAGES = 3  # blocks in flight of a program, the one at work included


def tile_tokens(tokens: int) -> int:
    """Tokens of a tile: the tensor cores take 16 at least, and 64 are the most we keep."""
    return next((tile for tile in _TOKEN_TILES if tokens <= tile), _TOKEN_TILES[-1])


def warps_of(block_rows: int) -> int:
    """Warps of a program: one for every 16 rows, lest two make the same tile, up to 4."""
    return min(4, block_rows // 16)


def parts_of(row_blocks: int, column_blocks: int, token_tiles: int, processors: int) -> int:
    """How many programs share a row of blocks, so that every processor has `_PROGRAMS_PER_SM`."""
    wanted = _PROGRAMS_PER_SM * processors // (row_blocks * token_tiles)
    parts = max(1, min(wanted, column_blocks // _LEAST_BLOCKS))
    return -(-column_blocks // -(-column_blocks // parts))  # none of them without a block


def multiply(x: torch.Tensor, weight: Blocks, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [tokens, columns] @ W.T + bias``.

    Args:
        x: contiguous, one token at least, bf16 or fp16; of the weight's type, if that is a float.
        bias: ``[rows]`` of x's type.

    Returns:
        ``[tokens, rows]`` of x's type, of fp32 sums in an order that does not change.
    """
    tokens = len(x)
    y = x.new_empty(tokens, weight.rows)
    tile = tile_tokens(tokens)
    tiles = -(-tokens // tile)
    parts = parts_of(weight.row_blocks, weight.column_blocks, tiles, _processors(x.device))
    first = y if parts == 1 else x.new_empty(parts, tokens, weight.rows, dtype=torch.float32)
    own_bias = bias if parts == 1 else None
    triton_kernels.product[weight.row_blocks, tiles, parts](
        x,
        *_tensors(weight, x),
        _or(own_bias, x),
        first,
        tokens,
        weight.rows,
        weight.columns,
        weight.column_blocks,
        BT=tile,
        **_constants(weight),
        BIAS=own_bias is not None,
        num_warps=warps_of(weight.block_rows),
        num_stages=STAGES,
    )
    if parts > 1:
        triton_kernels.add_parts[-(-y.numel() // _ADDED),](
            first, _or(bias, x), y, parts, y.numel(), weight.rows, _ADDED, bias is not None
        )
    return y


def unpack(weight: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight ``[rows, columns]``; value times scale is rounded once, to nearest even.

    With uint8 for ``dtype``: the fp8 values without their scales.
    """
    dense = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.values.device)
    triton_kernels.unpack[weight.row_blocks, weight.column_blocks](
        *_tensors(weight, dense),
        dense,
        weight.rows,
        weight.columns,
        weight.column_blocks,
        **_constants(weight),
        num_warps=warps_of(weight.block_rows),
    )
    return dense


def _tensors(weight: Blocks, unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    starts, scales = _or(weight.starts, unused), _or(weight.scales, unused)
    return weight.values, weight.bits, starts, scales


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A kernel wants a pointer, also where it does not read."""
    return unused if tensor is None else tensor


def _constants(weight: Blocks) -> dict[str, Any]:
    return {
        "BR": weight.block_rows,
        "BK": weight.block_columns,
        "TWO_FOUR": weight.two_four,
        "BITS": weight.value_bits,
        "FP8": weight.value_type == "fp8",
    }


@lru_cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; of a CPU that plays one 2."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
