"""Packed weights in a file: the same answers, one copy for all, no trust in what others wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.errors import EnvironmentFault
from secateur.serve.native import weights
from secateur.serve.native.model import NativeModel
from secateur.serve.native.weight_cache import WeightCache
from tests.compile.conftest import prune_by_hand
from tests.serve.native.stepping import random_steps, random_texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "home"))
    return tmp_path / "home" / "weights"


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shapes of all matrices that are packed."""
    seen: list[str] = []
    pack = weights.cpu.pack

    def counted(*parts: object, **more: object) -> object:
        seen.append(str(parts[2]))
        return pack(*parts, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(weights.cpu, "pack", counted)
    return seen


def answers(model: NativeModel) -> np.ndarray:  # type: ignore[type-arg]
    rng = np.random.default_rng(5)
    return np.concatenate(random_steps(model, random_texts(rng, 51, [9, 30, 1]), rng))


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@pytest.mark.parametrize("name", ["pruned", "fp32", "int8", "int4", "fp8"])
def test_the_same_answers_without_packing(
    made: Path, cache: Path, packs: list[str], name: str
) -> None:
    with NativeModel.open(made / name) as model:
        wanted, report, size = answers(model), model.report, model.weight_bytes
    own = len(packs)
    assert own > 0
    for packed in (2 * own, 2 * own):
        with NativeModel.open(made / name, cache_weights=True) as model:
            assert np.array_equal(answers(model), wanted)
            assert (model.report, model.weight_bytes) == (report, size)
        assert len(packs) == packed
    assert [file.name[:-17] for file in files(cache)] == [name]
    assert cache.stat().st_mode & 0o777 == 0o700
    assert files(cache)[0].stat().st_mode & 0o777 == 0o600


def test_every_choice_has_its_own_file_and_new_weights_replace_it(
    made: Path, tmp_path: Path, cache: Path, packs: list[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(made / "int8", model)
    NativeModel.open(model, cache_weights=True).close()
    NativeModel.open(model, cache_weights=True, kv_type="int8", max_length=32).close()
    assert len(files(cache)) == 1
    NativeModel.open(model, cache_weights=True, head="fp32").close()
    NativeModel.open(model, cache_weights=True, activations="fp32").close()
    assert len(files(cache)) == 3
    with safe_open(model / "model.safetensors", "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["model.layers.0.mlp.down_proj.weight_scales"] *= 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    packs.clear()
    with NativeModel.open(model) as plain, NativeModel.open(model, cache_weights=True) as cached:
        assert np.array_equal(answers(plain), answers(cached))
    assert len(files(cache)) == 3


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "longer"])
def test_a_damaged_file_is_made_anew(
    made: Path, cache: Path, packs: list[str], damage: str
) -> None:
    with NativeModel.open(made / "int4", cache_weights=True) as model:
        wanted = answers(model)
    (file,) = files(cache)
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 4
    file.write_bytes(
        {"bit": bytes(broken), "cut": whole[:-1000], "empty": b"", "longer": whole + b"x"}[damage]
    )
    packs.clear()
    with NativeModel.open(made / "int4", cache_weights=True) as model:
        assert np.array_equal(answers(model), wanted)
    assert packs
    assert file.read_bytes() == whole


def test_what_others_can_write_is_not_trusted(
    made: Path, cache: Path, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    NativeModel.open(made / "int8", cache_weights=True).close()
    (file,) = files(cache)
    file.chmod(0o622)
    packs.clear()
    NativeModel.open(made / "int8", cache_weights=True).close()
    assert packs
    assert file.stat().st_mode & 0o777 == 0o600
    cache.chmod(0o777)
    with pytest.raises(EnvironmentFault, match=r"others can write to it") as refusal:
        NativeModel.open(made / "int8", cache_weights=True)
    assert f"chmod go-w {cache}" in refusal.value.fix
    cache.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(EnvironmentFault, match=r"belongs to another user"):
        NativeModel.open(made / "int8", cache_weights=True)


def test_no_place_for_the_file(made: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be made"):
        NativeModel.open(made / "int8", cache_weights=True)
    cache.parent.unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EnvironmentFault, match=r"cannot be written to .*: No space left"):
        NativeModel.open(made / "int8", cache_weights=True)
    assert files(cache) == []


CHILD = """
import sys
from secateur.serve.native.model import NativeModel
model = NativeModel.open(sys.argv[1], cache_weights=True)
for matrix in model.matrices.values():
    matrix.decode()
print("open", flush=True)
sys.stdin.read()
"""


def test_processes_share_one_copy(tmp_path: Path, cache: Path) -> None:
    """Of what the weights take in memory each process pays its part: the kernel says so."""
    model = prune_by_hand(tmp_path / "model", "2:4", kind="qwen2", hidden=512, inner=4096)
    NativeModel.open(model, cache_weights=True).close()
    (file,) = files(cache)
    command = [sys.executable, "-c", CHILD, str(model)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
        for child in children:
            whole, part = memory_of(child.pid, file)
            assert whole >= 0.9 * file.stat().st_size
            assert part <= 0.4 * whole
    finally:
        for child in children:
            child.communicate()


def memory_of(pid: int, file: Path) -> tuple[int, int]:
    """Resident and proportional bytes of a process's mapping of a file."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(file)))
    sizes = {line.split(":")[0]: line.split()[1] for line in lines[start + 1 : start + 20]}
    return int(sizes["Rss"]) * 1024, int(sizes["Pss"]) * 1024


def test_two_that_start_at_once(made: Path) -> None:
    one, two = (WeightCache(made / "int8", {}) for _ in range(2))
    with NativeModel.open(made / "int8") as model:
        one.write(model.matrices)
        held = one.read()
        two.write(model.matrices)
        for name, matrix in model.matrices.items():
            assert np.array_equal(held[name].decode(), matrix.decode())
            assert np.array_equal(two.read()[name].decode(), matrix.decode())
