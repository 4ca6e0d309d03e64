"""The bit and value packing against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.bits import pack_mask, unpack_mask
from secateur.compile.bitmask import expand, pack_values
from secateur.pattern import Pattern
from tests.compile.conftest import brute_bits, brute_mask

CARRIERS = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
ALL = ["2:4", "4:8", "1:4", "4:16", "50%", "12.5%", "99%"]
ALL += [f"{base}@{height}x1" for base in ("2:4", "4:16", "50%", "90%") for height in (4, 8, 16)]
# -0.0, the smallest denormal, quiet and signalling NaNs with payload, infinity
ODD_BITS = {
    torch.int32: [-(2**31), 1, 0x7FC01234, 0x7F801234, 0x7F800000],
    torch.int16: [-(2**15), 1, 0x7E12, 0x7C12, 0x7C00, 0x7F92, 0x7F80],
}


def random_bits(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    carrier = CARRIERS[dtype]
    made = torch.Generator().manual_seed(seed)
    info = torch.iinfo(carrier)
    bits = torch.randint(info.min, info.max, (rows, columns), generator=made, dtype=carrier)
    for place, odd in enumerate(ODD_BITS[carrier]):
        bits.view(-1)[place::17] = odd
    return bits.view(dtype)


def check_round_trip(mask: torch.Tensor, height: int, dtype: torch.dtype, seed: int) -> None:
    rows, columns = mask.shape
    bits = pack_mask(mask, height)
    assert torch.equal(bits, brute_bits(mask, height))
    assert torch.equal(unpack_mask(bits, columns, height), mask)

    weight = random_bits(rows, columns, dtype, seed)
    source = weight.view(CARRIERS[dtype])
    values = pack_values(weight, mask)
    kept = [source[r, c].item() for r in range(rows) for c in range(columns) if mask[r, c]]
    assert values.dtype == dtype
    assert values.view(CARRIERS[dtype]).flatten().tolist() == kept
    per_row = {int(row.sum()) for row in mask}
    assert values.shape == ((rows, per_row.pop()) if len(per_row) == 1 else (len(kept),))

    dense = expand(values, mask)
    assert dense.dtype == dtype
    assert torch.equal(dense.view(CARRIERS[dtype]), source * mask)  # removed: +0.0, all bits zero


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    height=st.sampled_from([1, 1, 4, 8, 16]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(list(CARRIERS)),
    seed=st.integers(0, 1000),
)
def test_any_mask(
    rows: int, columns: int, height: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    shared = torch.rand(rows, columns, generator=made) < density
    if seed % 3 == 0:
        shared[0] = False
        shared[-1] = True
    check_round_trip(shared.repeat_interleave(height, 0), height, dtype, seed)


@pytest.mark.parametrize("dtype", list(CARRIERS))
@pytest.mark.parametrize("pattern", ALL)
def test_every_pattern(pattern: str, dtype: torch.dtype) -> None:
    chosen = Pattern.parse(pattern)
    mask = brute_mask(32, 48, chosen)
    chosen.check(mask)
    check_round_trip(mask, chosen.rows, dtype, 5)


def test_an_empty_matrix_has_no_values() -> None:
    assert pack_values(torch.ones(3, 5), torch.zeros(3, 5, dtype=torch.bool)).shape == (3, 0)


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (torch.zeros(2, 1, dtype=torch.int8), "uint8"),
        (torch.zeros(2, dtype=torch.uint8), "1 axes"),
        (torch.zeros(2, 3, dtype=torch.uint8), "2 bytes, not 3"),
        (torch.tensor([[0, 3], [0, 4]], dtype=torch.uint8), "row 1 has bits set past"),
    ],
)
def test_bits_that_do_not_fit_are_refused(bits: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpack_mask(bits, 10)


@pytest.mark.parametrize("count", [3, 5])
def test_values_must_match_the_mask(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} values for 4"):
        expand(torch.ones(count), torch.ones(2, 2, dtype=torch.bool))
