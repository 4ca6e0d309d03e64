"""Our sparse checkpoints against those of the last releases of compressed-tensors that had them.

Both releases run in processes of their own (tests/peers/release.py), from folders that
`make peers` fills. They read what we write, write what we write, and we read what they write.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.compile import write_compressed_tensors, write_marlin24
from secateur.compile.orphan import OrphanCheckpoint
from tests.compile.conftest import prune_by_hand, rewrite
from tests.compile.orphans import away_from_zero

pytestmark = pytest.mark.timeout(900)  # two processes that import torch and transformers

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "out" / "peers"


class Case(NamedTuple):
    """A model and a form that we write it in."""

    pattern: str
    dtype: torch.dtype
    options: dict[str, Any]
    marlin: bool = False
    zeros: bool = False
    release: str = "0.13.0"


CASES = {
    "24-bf16": Case("2:4", torch.bfloat16, {}),
    "24-fp16": Case("2:4", torch.float16, {}),
    "24-fp8": Case("2:4", torch.float32, {"values": "fp8"}),
    "24-fp8-tensor": Case("2:4", torch.float32, {"values": "fp8", "scales": "tensor"}),
    "24-int8": Case("2:4", torch.float32, {"values": "int8"}),
    "24-int8-zeros": Case("2:4", torch.float32, {"values": "int8"}, zeros=True),
    "bitmask-bf16": Case("62.5%", torch.bfloat16, {}),
    "bitmask-fp16": Case("4:8", torch.float16, {}),
    "bitmask-fp8": Case("50%@8x1", torch.float32, {"values": "fp8"}),
    "bitmask-int8": Case("50%", torch.float32, {"values": "int8"}),
    "old-bf16": Case("50%", torch.bfloat16, {"era": "0.8"}, release="0.8.1"),
    "old-fp32": Case("2:4", torch.float32, {"era": "0.8"}, release="0.8.1"),
    "marlin-int4": Case("2:4", torch.float16, {"values": "int4"}, marlin=True),
    "marlin-int8": Case("2:4", torch.float16, {"values": "int8"}, marlin=True),
    "marlin-int4-rows": Case(
        "2:4", torch.float16, {"values": "int4", "scales": "channel"}, marlin=True
    ),
    "marlin-int8-rows": Case(
        "2:4", torch.float16, {"values": "int8", "scales": "channel"}, marlin=True
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as we write it (NAME), as a release reads it (NAME.read) and writes it."""
    folder = tmp_path_factory.mktemp("peers")
    jobs: dict[str, list[dict[str, str]]] = {}
    for name, case in CASES.items():
        # 128, 256 and 384 inputs: marlin-24 orders the scales of the last only.
        hidden, inner = (128, 256 if "int8" in name else 384) if case.marlin else (32, 48)
        dense = ("k_proj", "v_proj") if case.marlin else ("k_proj",)
        pruned = prune_by_hand(
            folder / f"{name}.pruned",
            case.pattern,
            hidden=hidden,
            inner=inner,
            dtype=case.dtype,
            dense=dense,
        )
        if not case.zeros:
            rewrite(pruned, away_from_zero, "model.safetensors")
        if case.marlin:
            write_marlin24(pruned, folder / name, quantize="rtn", **case.options)
        else:
            write_compressed_tensors(pruned, folder / name, **case.options)
        weights = folder / f"{name}.weights"
        save_file(dense_and_scales(folder / name), weights)
        own = jobs.setdefault(case.release, [])
        own.append({"like": str(folder / name), "weights": str(weights)})
        own[-1]["to"] = str(folder / f"{name}.written")
        if not case.marlin:  # which no release could read
            own.append({"read": str(folder / name), "to": str(folder / f"{name}.read")})
    running = [start_release(release, own, folder) for release, own in jobs.items()]
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said[-3000:]
    return folder


def start_release(release: str, jobs: list[dict[str, str]], folder: Path) -> subprocess.Popen[str]:
    library = PEERS / f"compressed-tensors-{release}"
    if not library.is_dir():
        pytest.fail(f"{library.relative_to(ROOT)} is missing: run `make peers` first")
    file = folder / f"{release}.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("release.py")), file]
    environment = os.environ | {"PYTHONPATH": str(library)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, **streams)


def dense_and_scales(directory: Path) -> dict[str, torch.Tensor]:
    """The dense weights that a directory stands for, with the scales that they were rounded by."""
    orphan, stored = OrphanCheckpoint(directory), load_file(directory / "model.safetensors")
    tensors = {name: orphan.load(name) for name in orphan.names()}
    tensors |= {name: tensor for name, tensor in stored.items() if name.endswith("weight_scale")}
    for name in [name for name in stored if name.endswith(".scale_packed")]:
        weight = name.replace(".scale_packed", ".weight")
        found = orphan.scaled(weight)
        assert found is not None
        tensors[weight + "_scale"] = found.scales
    return tensors


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.zeros])
def test_the_release_writes_the_same_bytes(made: Path, name: str) -> None:
    ours = load_file(made / name / "model.safetensors")
    theirs = load_file(made / f"{name}.written")
    assert ours.keys() == theirs.keys()
    for tensor, own in ours.items():
        other = theirs[tensor]
        assert (own.dtype, own.shape) == (other.dtype, other.shape), tensor
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (own, other))), tensor


@pytest.mark.parametrize("name", CASES)
def test_we_read_the_same_weights_from_both(made: Path, tmp_path: Path, name: str) -> None:
    shutil.copyfile(made / name / "config.json", tmp_path / "config.json")
    shutil.copyfile(made / f"{name}.written", tmp_path / "model.safetensors")
    ours, theirs = OrphanCheckpoint(made / name), OrphanCheckpoint(tmp_path)
    assert ours.names() == theirs.names()
    for tensor in ours.names():
        assert torch.equal(ours.load(tensor), theirs.load(tensor)), tensor


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.marlin])
def test_the_release_reads_the_same_weights(made: Path, name: str) -> None:
    theirs, ours = load_file(made / f"{name}.read"), OrphanCheckpoint(made / name)
    assert ours.names() == sorted(theirs)
    for tensor, other in theirs.items():
        found = ours.scaled(tensor)
        if found is None:
            own = ours.load(tensor)
        else:  # the release rounds scales and products to fp16 where a weight was sparse
            own = found.values.to(other.dtype) * found.scales.to(other.dtype)
            assert torch.allclose(ours.load(tensor), other.float(), rtol=2**-9, atol=2**-24)
        assert own.dtype == other.dtype
        assert torch.equal(own, other), tensor


@pytest.mark.parametrize("name", ["24-bf16", "24-fp16", "bitmask-bf16", "old-bf16", "old-fp32"])
def test_what_both_read_is_what_was_pruned(made: Path, name: str) -> None:
    before = load_file(made / f"{name}.pruned" / "model.safetensors")
    after = load_file(made / f"{name}.read")
    assert before.keys() == after.keys()
    for tensor, weight in before.items():
        assert torch.equal(after[tensor], weight), tensor
