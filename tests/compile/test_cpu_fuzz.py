"""Damaged packed directories: refused with a ModelError, or read and multiplied as they now say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.compile import cpu, pack_model, read_packed
from secateur.errors import ModelError
from tests.compile.conftest import prune_by_hand

FILES = ["config.json", "model.safetensors"]


def damage(draw: random.Random, content: bytearray) -> None:
    """Flip bits, overwrite, repeat, remove or add bytes; more often near the beginning."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = draw.randrange(draw.choice([8, 4000] + [len(content)] * 4)) % len(content)
        kind = draw.randrange(10)
        if kind < 6:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 6:
            content[place] = draw.choice(b'0123456789,:[]{}"-') if place < 4000 else 0xFF
        elif kind == 7:
            other = draw.randrange(len(content))
            content[place : place + 8] = content[other : other + 8]
        elif kind == 8:
            del content[place : place + draw.choice([1, 8, 100])]
        else:
            content[place:place] = draw.randbytes(draw.choice([1, 8]))


def check(directory: Path, x: Any) -> None:
    """Every layer, in the layout of its pattern and dense, against the reader's dense weight."""
    model = read_packed(directory)
    for name in model.layers:
        pieces = model.pieces(name)
        dense = model.load(name + ".weight").float().numpy()
        inputs = np.resize(x, (3, dense.shape[1])).astype(np.float32)
        for layout in (None, "dense"):
            matrix = cpu.pack(
                pieces.values,
                pieces.bitmask,
                pieces.layer.shape,
                pieces.layer.pattern,
                pieces.value_type,
                scales=pieces.scales,
                group_size=pieces.group_size,
                layout=layout,
                activations="fp32",
            )
            with np.errstate(all="ignore"):
                tolerance = 1e-3 if matrix.layout == "4:16+rest" else 0.0
                decoded = matrix.decode()
                assert np.allclose(decoded, dense, rtol=tolerance, atol=0, equal_nan=True)
                found, size = matrix.matmul(inputs), np.abs(inputs) @ np.abs(dense).T
                clear = np.isfinite(size) & (size < 1e37)
                wanted = inputs.astype(np.float64) @ decoded.astype(np.float64).T
                assert (np.abs(found - wanted)[clear] <= 1e-5 * size[clear] + 1e-35).all()


@pytest.mark.parametrize(
    ("pattern", "values"),
    [("2:4", "bf16"), ("50%@8x1", "fp32"), ("4:8", "int8"), ("2:4", "int4"), ("80%", "int8")],
)
def test_damaged_directories(tmp_path: Path, pattern: str, values: Any) -> None:
    pruned = prune_by_hand(tmp_path / "pruned", pattern, hidden=16, inner=24)
    options = {"quantize": "rtn", "group_size": 32} if values.startswith("int") else {}
    pack_model(pruned, tmp_path / "packed", values=values, **options)
    sound = {name: (tmp_path / "packed" / name).read_bytes() for name in FILES}
    draw, x = random.Random(pattern + values), np.random.default_rng(0).standard_normal(72)
    check(tmp_path / "packed", x)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(100):
        name = draw.choice([FILES[0], FILES[1], FILES[1]])
        content = bytearray(sound[name])
        damage(draw, content)
        (tmp_path / "packed" / name).write_bytes(content)
        try:
            check(tmp_path / "packed", x)
            outcomes["read"] += 1
        except ModelError:
            outcomes["refused"] += 1
        (tmp_path / "packed" / name).write_bytes(sound[name])
    assert min(outcomes.values()) > 5
