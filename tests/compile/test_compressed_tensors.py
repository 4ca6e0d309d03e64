"""sparse-24-bitmask and sparse-bitmask, position by position, and what a reader refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.compile.compressed_tensors import decode, encode_nonzero, encode_two_of_four
from secateur.errors import ModelError
from secateur.pattern import Pattern
from tests.compile.conftest import brute_bits, brute_mask

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn]


def weights(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that each type has, some of them 0 and -0, and 0 where the mask removes."""
    made = torch.Generator().manual_seed(2)
    whole = torch.randint(-8, 9, mask.shape, generator=made).float()
    whole[whole == 8] = -0.0
    return (whole * mask).to(dtype)


def bits_of(tensor: torch.Tensor) -> list[bytes]:
    return [bytes(row) for row in tensor.contiguous().view(torch.uint8).tolist()]


@pytest.mark.parametrize("dtype", TYPES)
def test_two_of_four(dtype: torch.dtype) -> None:
    mask = brute_mask(6, 20, Pattern.parse("2:4"))
    weight = weights(mask.float(), dtype)
    found = encode_two_of_four(weight, mask)
    assert found[".compressed"].dtype == dtype
    assert found[".compressed"].float().tolist() == [
        [float(weight[row, column]) for column in range(20) if mask[row, column]]
        for row in range(6)
    ]
    assert torch.equal(found[".bitmask"], brute_bits(mask, 1))
    assert found[".shape"].tolist() == [[6], [20]]
    assert found.keys() == {".compressed", ".bitmask", ".shape"}
    kept = torch.where(mask, weight.float(), 0).to(dtype)
    assert bits_of(decode("P", found)) == bits_of(kept)


@given(
    rows=st.integers(0, 6),
    columns=st.integers(1, 37),
    dtype=st.sampled_from(TYPES),
    share=st.floats(0, 1),
)
def test_nonzero(rows: int, columns: int, dtype: torch.dtype, share: float) -> None:
    shape = (rows, columns) if rows else (columns,)
    made = torch.Generator().manual_seed(rows * 64 + columns)
    weight = weights((torch.rand(shape, generator=made) >= share).float(), dtype)
    found = encode_nonzero(weight)
    flat = weight.float().view(-1, columns)
    alive = [[value != 0 for value in row] for row in flat.tolist()]
    assert found[".compressed"].float().tolist() == [v for v in flat.view(-1).tolist() if v != 0]
    assert torch.equal(found[".bitmask"].view(len(alive), -1), brute_bits(torch.tensor(alive), 1))
    before = [sum(map(sum, alive[:row])) for row in range(len(alive))]
    assert found[".row_offsets"].view(-1).tolist() == before
    assert found[".row_offsets"].shape == weight.shape[:-1]
    assert found[".shape"].tolist() == list(shape)
    again = decode("P", found)
    assert (again.dtype, again.shape) == (dtype, weight.shape)
    assert again.float().tolist() == weight.float().tolist()
    assert not torch.signbit(again.float()[again.float() == 0]).any()


Damage = Callable[[dict[str, torch.Tensor]], object]
DAMAGES: list[tuple[Damage, str]] = [
    (lambda t: t.pop(".shape"), "no tensor 'P.shape'"),
    (lambda t: t.pop(".bitmask"), "no tensor 'P.bitmask'"),
    (lambda t: t.update({".shape": t[".shape"].int()}), "'P.shape' is damaged: it is torch.int32"),
    (lambda t: t.update({".shape": torch.tensor([6, 20, 1])}), "'P.shape' is damaged"),
    (lambda t: t.update({".shape": torch.tensor([6, -20])}), "it says"),
    (lambda t: t.update({".shape": torch.tensor([6, 1 << 50])}), "it says"),
    (lambda t: t.update({".shape": torch.tensor([6, 28])}), "'P.bitmask' is damaged: shape"),
    (lambda t: t.update({".shape": torch.tensor([7, 20])}), "'P.bitmask' is damaged: shape"),
    (lambda t: t.update({".bitmask": t[".bitmask"].char()}), "'P.bitmask' is damaged: type"),
    (lambda t: t[".bitmask"][2].fill_(255), "'P.bitmask' is damaged: row 2 has bits"),
    (lambda t: t[".bitmask"][1, 0].bitwise_xor_(1), "'P.(bitmask|compressed)' is damaged"),
    (lambda t: t.update({".compressed": t[".compressed"][..., 1:]}), "'P.compressed' is damaged"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
@pytest.mark.parametrize("unstructured", [False, True])
def test_damaged_tensors(damage: Damage, said: str, unstructured: bool) -> None:
    mask = brute_mask(6, 20, Pattern.parse("2:4"))
    weight = mask.float()
    tensors = encode_nonzero(weight) if unstructured else encode_two_of_four(weight, mask)
    damage(tensors)
    with pytest.raises(ModelError, match=said):
        decode("P", tensors)


def test_damaged_offsets() -> None:
    tensors = encode_nonzero(brute_mask(6, 20, Pattern.parse("50%")).float())
    tensors[".row_offsets"][3] += 1
    with pytest.raises(ModelError, match=r"'P\.row_offsets' is damaged: it does not count"):
        decode("P", tensors)
    tensors[".row_offsets"] = tensors[".row_offsets"].int()
    with pytest.raises(ModelError, match=r"'P\.row_offsets' is damaged: type"):
        decode("P", tensors)
