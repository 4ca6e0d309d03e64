"""What is multiplied when kernels are measured: masks, values, and the peers' forms of them."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.bench.kernel_peers import PEERS, make_peer, peer_bytes
from secateur.bench.kernel_weights import Weights, random_mask, relative_error
from secateur.bits import unpack_mask
from secateur.pattern import Pattern

KINDS = ("fp32", "bf16", "fp16", "int8", "int4")


@pytest.mark.parametrize(
    "text",
    ["dense", "2:4", "4:16", "1:4", "8:32", "50%", "80%", "90%", "12.5%", "50%@16x1", "2:4@8x1"],
)
def test_masks_have_their_pattern(text: str) -> None:
    pattern = Pattern.parse(text)
    blocks = random_mask(pattern, 48, 96, np.random.default_rng(0))
    assert blocks.shape == (48 // pattern.rows, 96)
    mask = blocks.repeat(pattern.rows, axis=0)
    pattern.check(mask)
    assert np.count_nonzero(~blocks) == pattern.removed_of(blocks.size)


@pytest.mark.parametrize("text", ["2:4", "8:32", "50%"])
def test_masks_keep_every_position_equally_often(text: str) -> None:
    mask = random_mask(Pattern.parse(text), 4096, 32, np.random.default_rng(1))
    share = float(1 - Pattern.parse(text).removed)
    assert np.abs(mask.mean(axis=0) - share).max() < 5 * np.sqrt(share * (1 - share) / 4096)


@pytest.mark.parametrize("text", ["2:4", "80%"])
def test_masks_differ_with_the_seed_only(text: str) -> None:
    pattern = Pattern.parse(text)
    first, again, other = (
        random_mask(pattern, 16, 64, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("kind", KINDS)
def test_kept_values_are_those_of_the_dense_weight(kind: str) -> None:
    draw = np.random.default_rng(0)
    weights = Weights.draw(kind, 10, 70, 32, draw)
    mask = random_mask(Pattern.parse("50%"), 10, 70, draw)
    mask[0, 0] ^= True  # an odd number of them
    kept, dense = weights.kept(mask), weights.dense(mask)
    assert dense.dtype == np.float32
    assert (dense[~mask] == 0).all()
    assert (dense == weights.dense() * mask).all()
    values: np.ndarray
    if kind == "int4":
        both = np.stack([kept & 0xF, kept >> 4], axis=1).reshape(-1)[: mask.sum()].astype(int)
        values = np.where(both > 7, both - 16, both)
        assert len(kept) == -(-mask.sum() // 2)
    elif kind == "bf16":
        values = (kept.astype(np.uint32) << 16).view(np.float32)
    else:
        values = kept.view(np.float16) if kind == "fp16" else kept
    if weights.scales is not None:
        assert weights.scales.shape == (10, 3)
        assert weights.scales.dtype == np.float16
        assert (weights.scales > 0).all()
        scales = weights.scales.astype(np.float32).repeat(32, axis=1)[:, :70]
        values = values * scales[mask]
    np.testing.assert_array_equal(dense[mask], values)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 127), ("int4", 7)])
def test_integers_take_their_whole_range(kind: str, limit: int) -> None:
    stored = Weights.draw(kind, 64, 64, 64, np.random.default_rng(0)).stored
    assert (stored.min(), stored.max()) == (-limit, limit)


def test_bits_are_those_of_a_packed_model() -> None:
    pattern = Pattern.parse("50%@4x1")
    blocks = random_mask(pattern, 8, 30, np.random.default_rng(0))
    import torch

    bits = torch.from_numpy(np.packbits(blocks, axis=1, bitorder="little"))
    mask = unpack_mask(bits, 30, 4).numpy()
    assert (mask == blocks.repeat(4, axis=0)).all()


def test_relative_error() -> None:
    truth = np.array([3.0, 4.0])
    assert relative_error(np.array([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(np.array([3.0, np.nan]), truth) == float("inf")


@pytest.mark.parametrize("name", PEERS)
def test_peers_multiply_the_same_weight(name: str) -> None:
    """Every copy does; 100 inputs are no multiple of the block."""
    kind = {"ort-int8": "int8", "ort-nbits8": "int8", "ort-nbits4": "int4"}.get(name, "bf16")
    draw = np.random.default_rng(0)
    weights = Weights.draw(kind, 24, 100, 32, draw)
    if name == "ort-int8":  # its products of pairs overflow where the CPU has no VNNI
        weights.stored[:] //= 4
        weights.stored[:, 0] = 127
    x = draw.standard_normal((3, 100), dtype=np.float32)
    peer = make_peer(name, weights, 32, 20, 1, False)
    assert peer.nbytes == peer_bytes(name, 24, 100, 32)
    runner = peer.bind(x)
    assert peer.copies >= 20
    assert runner.calls == (1 if name.startswith("torch") else 2)
    allowed = 1e-5 if name.endswith("fp32") else 0.02
    for _ in range(peer.copies // runner.calls):
        runner.result()[:] = 0
        runner.run(1)
        assert relative_error(runner.result(), x @ weights.dense().T) < allowed
