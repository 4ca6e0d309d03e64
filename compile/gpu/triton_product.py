"""Products with `Blocks` through the Triton kernels: how they are launched.

The numbers of rows, programs and warps are those that were fastest on an H100 with weights of
Llama-3.1-8B (docs/gpu.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton

from secateur.compile.gpu import triton_kernels
from secateur.compile.gpu.blocks import Blocks

INTERPRETED: bool = triton_kernels.INTERPRETED.value
"""Whether the kernels run in Python, on CPU tensors (TRITON_INTERPRET=1)."""

_TOKEN_TILES = (16, 32, 64)
_LEAST_ROWS = 64  # of a program with 2:4
_PROGRAMS_PER_SM = 8  # with two to four warps each, so that loads of some hide the work of others
_LEAST_BLOCKS = 4  # of a program: fewer do not repay its start
_ADDED = 1024  # elements that one program of `add_parts` adds
_ROWS, _SPAN = 8, 1024  # of a program of `one_token`, and columns that it takes at once
STAGES = 3  # blocks in flight of a program, the one at work included


def tile_tokens(tokens: int) -> int:
    """Tokens of a tile: the tensor cores take 16 at least, and 64 are the most we keep."""
    return next((tile for tile in _TOKEN_TILES if tokens <= tile), _TOKEN_TILES[-1])


def tile_rows(weight: Blocks) -> int:
    """Rows of a program: those of a block, and 64 at least where rows lie one after the other.

    Each program reads all inputs, which for many tokens takes longer than the weight.
    """
    divides = weight.two_four and weight.bits.shape[0] % _LEAST_ROWS == 0
    return max(weight.block_rows, _LEAST_ROWS) if divides else weight.block_rows


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
    if tokens == 1 and weight.two_four:
        return _one_token(x, weight, bias, y)
    tile = tile_tokens(tokens)
    tiles = -(-tokens // tile)
    height = tile_rows(weight)
    row_tiles = -(-weight.rows // height)
    parts = parts_of(row_tiles, weight.column_blocks, tiles, _processors(x.device))
    first = y if parts == 1 else x.new_empty(parts, tokens, weight.rows, dtype=torch.float32)
    own_bias = bias if parts == 1 else None
    triton_kernels.product[row_tiles, tiles, parts](
        x,
        *_tensors(weight, x),
        _or(own_bias, x),
        first,
        tokens,
        weight.rows,
        weight.columns,
        weight.column_blocks,
        BT=tile,
        **_constants(weight) | {"BR": height},
        BIAS=own_bias is not None,
        num_warps=warps_of(height),
        num_stages=STAGES,
    )
    if parts > 1:
        triton_kernels.add_parts[-(-y.numel() // _ADDED),](
            first, _or(bias, x), y, parts, y.numel(), weight.rows, _ADDED, bias is not None
        )
    return y


def _one_token(
    x: torch.Tensor, weight: Blocks, bias: torch.Tensor | None, y: torch.Tensor
) -> torch.Tensor:
    rows, columns = weight.bits.shape[0], 8 * weight.bits.shape[1]
    triton_kernels.one_token[rows // _ROWS,](
        x,
        weight.values,
        weight.bits,
        _or(weight.scales, x),
        _or(bias, x),
        y,
        weight.rows,
        weight.columns,
        rows,
        columns,
        BR=_ROWS,
        SPAN=min(_SPAN, triton.next_power_of_2(columns)),
        GROUP=weight.block_columns,
        BITS=weight.value_bits,
        FP8=weight.value_type == "fp8",
        BIAS=bias is not None,
        num_warps=4,
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


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`secateur.compile.quantize.round_tokens` of contiguous inputs, in one kernel."""
    tokens, columns = x.shape
    rounded = torch.empty(tokens, columns, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    span = min(4096, triton.next_power_of_2(columns))
    triton_kernels.round_tokens[tokens,](x, rounded, scales, columns, SPAN=span, num_warps=8)
    return rounded.view(torch.float8_e4m3fn), scales


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
