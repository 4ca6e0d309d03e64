"""Triton kernels: read kept values and bits, make dense tiles of them, multiply densely.

    y [tokens, rows] = x [tokens, columns] @ W.T

One kernel for all sparse patterns and for bf16, fp16, int8, int4 and fp8 values: the weight lies in
blocks (`secateur.compile.gpu.blocks`). A program makes BR rows of y. Block after block it loads
values and bits with vector loads, spreads the values to their columns in registers, and multiplies
the tile with the tensor cores, which accumulate in fp32.

With one token and 2:4 (`one_token`) nothing is spread: each kept value picks its input of four, and
is multiplied in fp32 where it was loaded. The tile for the tensor cores would pass through shared
memory, which takes longer than to read the weight.

How values find their columns:

- 2:4: a group of four columns is two values and four bits; each column takes one of the two.
- Any other mask: a kept column's value lies at its rank, the number of bits set in the block
  before it. Ranks come from a prefix sum over bytes of bits; values are gathered through shared
  memory.

With TRITON_INTERPRET=1 in the environment at import they run in Python, slowly, on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
_EXACT: tl.constexpr = tl.constexpr(0x4B000000)  # 2^23 as fp32: its last bits count units


@triton.jit
def _integers(biased: tl.tensor, zero: tl.constexpr) -> tl.tensor:
    """Integers stored with ``zero`` added, in int32, as fp32: two fast operations, exactly."""
    return (biased | _EXACT).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def _fp8(byte: tl.tensor) -> tl.tensor:
    """e4m3fn as fp16: moved to fp16's exponent it is 2^-8 of itself, subnormals too, exactly.

    For GPUs of all capabilities; the conversion of triton needs 8.9.
    """
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _to_fp8(value: tl.tensor) -> tl.tensor:
    """The bytes of fp32 in e4m3fn, rounded to nearest even; beyond 448 it is 448.

    By hand: triton's interpreter loses the carry into the exponent.
    """
    size = tl.minimum(tl.abs(value), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 15  # in units of 2^-9
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def _even_odd8(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    e: tl.tensor,
    f: tl.tensor,
    g: tl.tensor,
    h: tl.tensor,
) -> tl.tensor:
    """Eight ``[n]`` as ``[8 n]``: the first of each, then the second of each, and so on."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), (a.shape[0] * 8,))


@triton.jit
def _two_four(kept: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """Spread two values for every four columns.

    Args:
        kept: ``[2 g]``, the values.
        bits: ``[g / 2]``, a byte of two groups each, as int32.

    Returns:
        ``[4 g]``.
    """
    GROUPS: tl.constexpr = kept.shape[0] // 2
    a, b = tl.split(tl.reshape(kept, (GROUPS, 2)))
    group = tl.reshape(tl.join(bits & 15, bits >> 4), (GROUPS,))
    b0, b1, b2, b3 = (group & 1) != 0, (group & 2) != 0, (group & 4) != 0, group >= 8
    zero = tl.zeros_like(a)
    w0 = tl.where(b0, a, zero)
    w1 = tl.where(b1, tl.where(b0, b, a), zero)
    w2 = tl.where(b2, tl.where(b3, a, b), zero)
    w3 = tl.where(b3, b, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * GROUPS,))


@triton.jit
def _any_mask(kept: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """Spread values to the columns whose bits are set.

    Args:
        kept: ``[n]``, the values and what follows them.
        bits: ``[n / 8]``, bytes as int32.

    Returns:
        ``[n]``.
    """
    b0, b1, b2, b3 = bits & 1, (bits >> 1) & 1, (bits >> 2) & 1, (bits >> 3) & 1
    b4, b5, b6, b7 = (bits >> 4) & 1, (bits >> 5) & 1, (bits >> 6) & 1, bits >> 7
    counts = b0 + b1 + b2 + b3 + b4 + b5 + b6 + b7
    r0 = tl.cumsum(counts, 0) - counts
    r1 = r0 + b0
    r2 = r1 + b1
    r3 = r2 + b2
    r4 = r3 + b3
    r5 = r4 + b4
    r6 = r5 + b5
    r7 = r6 + b6
    ranks = _even_odd8(r0, r1, r2, r3, r4, r5, r6, r7)
    keeps = _even_odd8(b0, b1, b2, b3, b4, b5, b6, b7) != 0
    return tl.where(keeps, tl.gather(kept, ranks, 0), tl.zeros_like(kept))


@triton.jit
def _dot(weight: tl.tensor, x: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Add weight @ x.T to acc, in fp32."""
    if INTERPRETED:  # triton 3.9's interpreter would multiply the bits of bf16 as integers
        return tl.dot(weight.to(tl.float32), tl.trans(x.to(tl.float32)), acc)
    return tl.dot(weight, tl.trans(x), acc)


@triton.jit
def _tile(
    values: tl.tensor,
    bits: tl.tensor,
    starts: tl.tensor,
    row_block: tl.tensor,
    j: tl.tensor,
    blocks: tl.tensor,
    DTYPE: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    TWO_FOUR: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
) -> tl.tensor:
    """Block j of a row of blocks, dense and without its scales, ``[BR, BK]`` of DTYPE.

    With uint8 for DTYPE fp8 values stay what they are.
    """
    row = row_block * BR + tl.arange(0, BR)[:, None]
    at = (row * blocks + j) * (BK // 8) + tl.arange(0, BK // 8)[None, :]
    byte = tl.reshape(tl.load(bits + at), (BR * BK // 8,)).to(tl.int32)
    if TWO_FOUR:
        WIDTH: tl.constexpr = BK // 4 if BITS == 4 else BK // 2
        at = (row * blocks + j) * WIDTH + tl.arange(0, WIDTH)[None, :]
        stored = tl.reshape(tl.load(values + at), (BR * WIDTH,))
    else:
        SIZE: tl.constexpr = BR * BK // 2 if BITS == 4 else BR * BK
        UNIT: tl.constexpr = 16 if BITS < 16 else 8  # elements in 16 bytes
        start = tl.load(starts + row_block * blocks + j).to(tl.int64)
        units = tl.load(starts + row_block * blocks + j + 1).to(tl.int64) - start
        place = tl.arange(0, SIZE)
        stored = tl.load(values + start * UNIT + place, mask=place // UNIT < units, other=0)
    if BITS == 4:
        pairs = stored.to(tl.int32)
        halves = tl.join(pairs & 15, pairs >> 4)
        kept = _integers(tl.reshape(halves, (stored.shape[0] * 2,)), 8).to(DTYPE)
    elif FP8:
        kept = stored if tl.uint8 == DTYPE else _fp8(stored.to(tl.int32)).to(DTYPE)
    elif BITS == 8:
        kept = _integers(stored.to(tl.int32), 128).to(DTYPE)
    else:
        kept = stored
    spread = _two_four(kept, byte) if TWO_FOUR else _any_mask(kept, byte)
    return tl.reshape(spread, (BR, BK))


@triton.jit(do_not_specialize=["tokens"])
def product(
    x: tl.tensor,
    values: tl.tensor,
    bits: tl.tensor,
    starts: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    TWO_FOUR: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """See the module. Grid: rows of blocks, tiles of BT tokens, programs that share a row.

    Args:
        x: ``[tokens, columns]``, bf16 or fp16, of the type of floating-point values.
        values, bits, starts, scales: of `Blocks`.
        bias: ``[rows]``, of x's type; read if BIAS, which goes with one program a row.
        y: ``[tokens, rows]``, of x's type; if programs share a row fp32
            ``[programs, tokens, rows]``, of which `add_parts` makes the result.
        blocks: in a row of blocks.
        BT: tokens of a tile.
        BR, BK: rows and columns of a block.
        BITS: of a value; 4 and 8 have scales.
        FP8: whether 8 bits are e4m3fn, with one scale for each row, and not integers.
    """
    row_block, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    row = row_block * BR + tl.arange(0, BR)
    each = tl.cdiv(blocks, tl.num_programs(2))
    acc = tl.zeros((BR, BT), tl.float32)
    for j in range(part * each, min(part * each + each, blocks)):
        column = j * BK + tl.arange(0, BK)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        given = tl.load(x + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
        weight = _tile(
            values, bits, starts, row_block, j, blocks, given.dtype, BR, BK, TWO_FOUR, BITS, FP8
        )
        if BITS < 16 and not FP8:
            scale = tl.load(scales + j * (tl.num_programs(0) * BR) + row).to(tl.float32)
            acc += _dot(weight, given, tl.zeros_like(acc)) * scale[:, None]
        else:
            acc = _dot(weight, given, acc)
    if FP8:
        acc *= tl.load(scales + row)[:, None]
    out = tl.trans(acc)
    if BIAS:
        out += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    place = (part.to(tl.int64) * tokens + token[:, None]) * rows + row[None, :]
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def one_token(
    x: tl.tensor,
    values: tl.tensor,
    bits: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    padded_rows: tl.tensor,
    padded: tl.tensor,
    BR: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """The product with one token and 2:4. Grid: BR rows each.

    Args:
        x: ``[columns]``, bf16 or fp16, of the type of floating-point values.
        values, bits, scales: of `Blocks`.
        bias, y: ``[rows]``, of x's type; the bias is read if BIAS.
        padded_rows, padded: rows and columns of the padded weight.
        SPAN: columns at once.
        GROUP: columns that share a scale, of integers.
        BITS, FP8: as of `product`.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    GROUPS: tl.constexpr = SPAN // 4
    acc = tl.zeros((BR, GROUPS), tl.float32)
    for first in range(0, padded, SPAN):
        group = first // 4 + tl.arange(0, GROUPS)
        at = first // 8 + tl.arange(0, SPAN // 8)
        inside = (at < padded // 8)[None, :]
        byte = tl.load(bits + row[:, None] * (padded // 8) + at[None, :], mask=inside, other=0)
        byte = byte.to(tl.int32)
        four = tl.reshape(tl.join(byte & 15, byte >> 4), (BR, GROUPS))
        if BITS == 4:
            inside = (group < padded // 4)[None, :]
            stored = values + row[:, None] * (padded // 4) + group[None, :]
            pair = tl.load(stored, mask=inside, other=0).to(tl.int32)
            a, b = _integers(pair & 15, 8), _integers(pair >> 4, 8)
        else:
            at = first // 2 + tl.arange(0, SPAN // 2)
            inside = (at < padded // 2)[None, :]
            stored = values + row[:, None] * (padded // 2) + at[None, :]
            pairs = tl.reshape(tl.load(stored, mask=inside, other=0), (BR, GROUPS, 2))
            a, b = tl.split(pairs)
            if FP8:
                a, b = _fp8(a.to(tl.int32)).to(tl.float32), _fp8(b.to(tl.int32)).to(tl.float32)
            elif BITS == 8:
                a, b = _integers(a.to(tl.int32), 128), _integers(b.to(tl.int32), 128)
            else:
                a, b = a.to(tl.float32), b.to(tl.float32)
        column = first + tl.arange(0, SPAN)
        given = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(given, (GROUPS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        for_a = tl.where(
            (four & 1) != 0, x0[None, :], tl.where((four & 2) != 0, x1[None, :], x2[None, :])
        )
        for_b = tl.where(
            four >= 8, x3[None, :], tl.where((four & 4) != 0, x2[None, :], x1[None, :])
        )
        if BITS < 16 and not FP8:
            of = (4 * group // GROUP)[None, :] * padded_rows + row[:, None]
            scale = tl.load(scales + of, mask=(4 * group < padded)[None, :], other=0.0)
            acc += (a * for_a + b * for_b) * scale.to(tl.float32)
        else:
            acc += a * for_a
            acc += b * for_b
    out = tl.sum(acc, 1)
    if FP8:
        out *= tl.load(scales + row)
    if BIAS:
        out += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def round_tokens(
    x: tl.tensor,
    rounded: tl.tensor,
    scales: tl.tensor,
    columns: tl.tensor,
    SPAN: tl.constexpr,
) -> None:
    """Inputs ``[tokens, columns]`` in e4m3fn with a scale for each token. Grid: tokens.

    Finite ones to the bit as `secateur.compile.quantize.round_tokens`, whose passes it fuses.
    """
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((SPAN,), tl.float32)
    for first in range(0, columns, SPAN):
        column = first + tl.arange(0, SPAN)
        part = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
        largest = tl.maximum(largest, tl.abs(part.to(tl.float32)), tl.PropagateNan.ALL)
    scale = tl.div_rn(tl.max(largest, 0), 448.0)
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scales + token, scale)
    for first in range(0, columns, SPAN):
        column = first + tl.arange(0, SPAN)
        part = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
        part = _to_fp8(tl.div_rn(part.to(tl.float32), scale))
        tl.store(rounded + token * columns + column, part, mask=column < columns)


@triton.jit
def add_parts(
    parts: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """Make y ``[size]``: the sum of ``parts [count, size]`` in order, plus ``bias [rows]``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * size + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def unpack(
    values: tl.tensor,
    bits: tl.tensor,
    starts: tl.tensor,
    scales: tl.tensor,
    dense: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    BR: tl.constexpr,
    BK: tl.constexpr,
    TWO_FOUR: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    """The dense weight ``[rows, columns]``, value times scale rounded once. Grid: all blocks.

    A uint8 weight is the fp8 values without their scales.
    """
    row_block, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column = row_block * BR + tl.arange(0, BR), j * BK + tl.arange(0, BK)
    DTYPE: tl.constexpr = dense.dtype.element_ty
    weight = _tile(values, bits, starts, row_block, j, blocks, DTYPE, BR, BK, TWO_FOUR, BITS, FP8)
    if BITS < 16 and tl.uint8 != DTYPE:
        own = row if FP8 else j * (tl.num_programs(0) * BR) + row
        scale = tl.load(scales + own).to(tl.float32)
        weight = (weight.to(tl.float32) * scale[:, None]).to(DTYPE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(dense + row[:, None] * columns + column[None, :], weight, mask=inside)
