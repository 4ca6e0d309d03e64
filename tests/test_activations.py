"""Hidden states come back bit for bit, from memory and from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.activations import Activations

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EVERY_TYPE = pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)


def noise(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bits: NaN of every kind, infinities and denormals among them."""
    whole = INTEGERS[dtype]
    limits = torch.iinfo(whole)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=whole)
    return bits.view(dtype)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
    assert torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype]))


@pytest.fixture(params=["memory", "file"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "states" if request.param == "file" else None


@EVERY_TYPE
def test_in_any_order_and_again(dtype: torch.dtype, file: Path | None) -> None:
    kept, wanted = Activations(4, file), {}
    assert len(kept) == 4
    for seed, number in enumerate([2, 0, 3, 1, 2, 0]):  # the last two are written over
        wanted[number] = noise(dtype, 1, 5, 3, seed=seed)
        kept[number] = wanted[number]
        for known, tensor in wanted.items():
            assert_same(kept[known], tensor)
    kept.close()
    assert file is None or not file.exists()


@EVERY_TYPE
def test_whatever_lies_behind_the_tensor(dtype: torch.dtype, file: Path | None) -> None:
    """A transposed view, a slice, a tensor with a gradient."""
    kept, base = Activations(3, file), noise(dtype, 1, 6, 4)
    given = [base.mT, noise(dtype, 1, 9, 6)[:, 1:5], noise(dtype, 1, 4, 6).requires_grad_()]
    for number, tensor in enumerate(given):
        kept[number] = tensor
    for number, tensor in enumerate(given):
        assert_same(kept[number].detach(), tensor.detach())
    kept.close()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_file_is_like_a_list(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(list(INTEGERS)))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    writes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    file = tmp_path_factory.getbasetemp() / "states"
    kept, plain = Activations(4, file), {}
    for seed, number in enumerate(writes):
        kept[number] = plain[number] = noise(dtype, *shape, seed=seed)
    for number, tensor in plain.items():
        assert_same(kept[number], tensor)
    kept.close()
    assert not file.exists()


def test_what_is_read_from_a_file_is_a_copy(tmp_path: Path) -> None:
    """Blocks may work in place."""
    kept = Activations(1, tmp_path / "states")
    kept[0] = torch.ones(2, 3)
    kept[0].zero_()
    assert torch.equal(kept[0], torch.ones(2, 3))
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_harmless(file: Path | None) -> None:
    kept = Activations(1, file)
    kept[0] = torch.ones(1)
    kept.close()
    kept.close()
