"""How a CpuMatrix is used: odd inputs, biases, outputs, several at once, threads, forks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from secateur.compile import cpu
from tests.compile.cpu_reference import TYPES, Weight, error, make_weight, restored

PATTERNS = ["dense", "2:4", "4:16", "4:8", "50%", "90%", "50%@4x1", "50%@8x1", "75%@16x1"]
MIXED = [("2:4", "bf16"), ("80%", "int8"), ("50%@4x1", "int4"), ("dense", "fp32"), ("4:8", "int8")]
MIXED += [("70%", "fp32"), ("75%@16x1", "int8")]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    with restored():
        yield


def weight(pattern: str, value_type: Any, rows: int = 48, columns: int = 208) -> Weight:
    return make_weight(np.random.default_rng(0), (rows, columns), pattern, value_type, 32)


def inputs(tokens: int, columns: int = 208, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((tokens, columns), np.float32)


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_infinite_and_nan_inputs(pattern: str, value_type: Any) -> None:
    """They spoil their own token only, and there every output that a kept weight leads to.

    With int8 activations it is enough that one is kept in the same group of columns.
    """
    sound = weight(pattern, value_type)
    matrix = sound.pack()
    for name in cpu.isas():
        cpu.use_isa(name)
        for tokens in (2, 7, 16, 19):
            x = inputs(tokens)
            bad = x.copy()
            spoilt = {0: {5: np.inf}, tokens - 1: {0: np.nan, 207: -np.inf}}
            for token, places in spoilt.items():
                for column, value in places.items():
                    bad[token, column] = value
            y = matrix.matmul(bad)
            fine = [token for token in range(tokens) if token not in spoilt]
            if fine:
                assert np.array_equal(y[fine], matrix.matmul(x)[fine])
            for token, places in spoilt.items():
                columns = list(places)
                if matrix.rounds_inputs(tokens):
                    columns = [c for c in range(208) if c // 32 in {p // 32 for p in places}]
                met = sound.mask[:, columns].any(axis=1)
                assert not np.isfinite(y[token, met]).any()


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_and_denormal_inputs(pattern: str, value_type: Any) -> None:
    sound = weight(pattern, value_type)
    matrix = sound.pack()
    for name in cpu.isas():
        cpu.use_isa(name)
        for tokens in (1, 4, 18):
            x = inputs(tokens)
            y = matrix.matmul(x)
            x[:, ::7] = 0.0
            zeros = x.copy()
            zeros[:, ::7] = -0.0
            assert np.array_equal(matrix.matmul(zeros), matrix.matmul(x))
            assert not matrix.matmul(np.full_like(x, -0.0)).any()
            denormal = np.full_like(x, 1e-41) * np.sign(x)
            assert np.abs(matrix.matmul(denormal)).max() < 1e-36
            mixed = x.copy()
            mixed[:, ::7] = 1e-41
            assert error(matrix.matmul(mixed), sound, matrix, mixed) < 1e-6
            huge = inputs(tokens) * np.float32(2.0**100)
            assert np.allclose(matrix.matmul(huge), y * np.float32(2.0**100), rtol=1e-6)


@pytest.mark.parametrize(("pattern", "value_type"), MIXED)
def test_bias_and_out(pattern: str, value_type: Any) -> None:
    matrix = weight(pattern, value_type).pack()
    bias = inputs(1, 48)[0]
    for tokens in (0, 1, 5, 20, 40):
        x = inputs(tokens)
        plain = matrix.matmul(x)
        assert plain.shape == (tokens, 48)
        assert plain.dtype == np.float32
        assert np.array_equal(matrix.matmul(x, bias), plain + bias)
        out = np.full((tokens + 2, 48), np.float32(7))
        assert matrix.matmul(x, bias, out=out[1:-1]).base is out
        assert np.array_equal(out[1:-1], plain + bias)
        assert (out[[0, -1]] == 7).all()


def test_several_matrices_at_once() -> None:
    """Of all types and group sizes, with one input: the same as one after the other."""
    rng = np.random.default_rng(2)
    made = [
        make_weight(rng, (16 * (i + 1), 208), pattern, value_type, 32 << i % 3)
        for i, (pattern, value_type) in enumerate(MIXED * 2)  # type: ignore[misc]
    ]
    matrices = [each.pack() for each in made]
    biases = [None if i % 2 else inputs(1, m.rows)[0] for i, m in enumerate(matrices)]
    for tokens in (0, 1, 3, 16, 17, 40):
        x = inputs(tokens)
        alone = [m.matmul(x, b) for m, b in zip(matrices, biases, strict=True)]
        outs = [np.empty((tokens, m.rows), np.float32) for m in matrices]
        found = cpu.matmul(matrices, x, biases, outs)
        assert all(a is b for a, b in zip(found, outs, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True))
    without = cpu.matmul(matrices, inputs(2))
    assert all(
        np.array_equal(y, m.matmul(inputs(2))) for y, m in zip(without, matrices, strict=True)
    )
    assert cpu.matmul([], inputs(1)) == []


@pytest.mark.parametrize(("pattern", "value_type"), MIXED)
def test_a_clone_stands_alone(pattern: str, value_type: Any) -> None:
    matrix = weight(pattern, value_type).pack()
    x, decoded = inputs(3), matrix.decode()
    wanted, clone = matrix.matmul(x), matrix.clone()
    assert repr(clone) == repr(matrix)
    assert (clone.activations, clone.why) == (matrix.activations, matrix.why)
    del matrix
    assert np.array_equal(clone.decode(), decoded)
    assert np.array_equal(clone.matmul(x), wanted)


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_threads_change_no_bit(pattern: str, value_type: Any) -> None:
    cpu.set_threads(1)
    sound = weight(pattern, value_type, 400, 300 if pattern == "dense" else 304)
    matrix = sound.pack()
    alone = {tokens: matrix.matmul(inputs(tokens, sound.shape[1])) for tokens in (1, 5, 30)}
    cpu.set_threads(2)
    assert cpu.threads() == 2
    assert np.array_equal(sound.pack().decode(), matrix.decode())
    for tokens, wanted in alone.items():
        assert np.array_equal(matrix.matmul(inputs(tokens, sound.shape[1])), wanted)


def test_two_callers_at_once() -> None:
    cpu.set_threads(2)
    matrices = [weight(pattern, value_type, 256).pack() for pattern, value_type in MIXED]
    xs = {tokens: inputs(tokens) for tokens in (1, 4, 20)}
    wanted = {tokens: cpu.matmul(matrices, x) for tokens, x in xs.items()}

    def run(_: int) -> bool:
        return all(
            np.array_equal(a, b)
            for _ in range(30)
            for tokens, x in xs.items()
            for a, b in zip(cpu.matmul(matrices, x), wanted[tokens], strict=True)
        )

    with ThreadPoolExecutor(2) as callers:
        assert all(callers.map(run, range(2)))


FORK = """
import os, sys
import numpy as np
from secateur.compile import cpu
from secateur.pattern import Pattern

w = np.arange(512 * 256, dtype=np.float32).reshape(512, 256)
cpu.set_threads(2)
matrix = cpu.pack(w, None, w.shape, Pattern.parse("dense"), "fp32")
x = np.ones((3, 256), np.float32)
wanted = matrix.matmul(x)
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(np.array_equal(matrix.matmul(x), wanted) for _ in range(20)) else 1)
    assert np.array_equal(matrix.matmul(x), wanted)
    assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


def test_a_fork_makes_threads_of_its_own() -> None:
    ran = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.returncode) == ("fine\n", 0), ran.stderr


@pytest.mark.parametrize(("pattern", "value_type"), MIXED)
def test_arrays_that_do_not_fit(pattern: str, value_type: Any) -> None:
    matrix = weight(pattern, value_type).pack()
    x, out = inputs(3), np.zeros((3, 48), np.float32)
    for wrong, said in [
        ({"x": x[:, :-1].copy()}, r"inputs \[3, 207\] for a matrix \[48, 208\]"),
        ({"bias": out[0, :-1].copy()}, "47 biases for 48 rows"),
        ({"out": np.zeros((2, 48), np.float32)}, r"outputs \[2, 48\], not \[3, 48\]"),
        ({"out": np.zeros((3, 49), np.float32)}, r"outputs \[3, 49\], not \[3, 48\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            matrix.matmul(**({"x": x} | wrong))
        listed = {"x": x} | {
            {"bias": "biases", "out": "outs", "x": "x"}[key]: value if key == "x" else [value]
            for key, value in wrong.items()
        }
        with pytest.raises(ValueError, match=said):
            cpu.matmul([matrix], **listed)
    with pytest.raises(ValueError, match="not one output, bias and flag for each matrix"):
        cpu.matmul([matrix, matrix], x, None, [out])
    for wrong in [
        {"x": x[0]},
        {"x": x.astype(np.float64)},
        {"x": np.asfortranarray(x)},
        {"x": x.tolist()},
        {"x": x, "bias": out[0].astype(np.float64)},
        {"x": x, "bias": out},
        {"x": x, "out": out.astype(np.float64)},
        {"x": x, "out": np.asfortranarray(out)},
        {"x": x, "out": np.zeros((3, 96), np.float32)[:, ::2]},
    ]:
        with pytest.raises(TypeError):
            matrix.matmul(**wrong)
    for key, value in [("outs", out.astype(np.float64)), ("biases", out[0].astype(np.float64))]:
        with pytest.raises(TypeError):
            cpu.matmul([matrix], x, **{key: [value]})
    with pytest.raises(TypeError):
        cpu.matmul([matrix], x.astype(np.float64))
    frozen = out.copy()
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        matrix.matmul(x, out=frozen)
