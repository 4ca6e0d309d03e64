"""Where and in which type to compute."""

from __future__ import annotations

import pytest
import torch

from secateur import device
from secateur.device import choose_device, choose_dtype
from secateur.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("flags", "stored", "chosen"),
    [
        ("avx2 fma", "float32", "float32"),
        ("avx2 fma", "bfloat16", "float32"),
        ("avx512f avx512_bf16", "bfloat16", "bfloat16"),
        ("amx_bf16", "bfloat16", "bfloat16"),
        ("avx512f avx512_bf16", "float16", "float32"),
        ("avx512f avx512_bf16", "float32", "float32"),
    ],
)
def test_a_cpu_computes_only_what_it_multiplies_in_hardware(
    flags: str, stored: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cpu_facts", lambda: {"flags": flags})
    dtype, reason = choose_dtype("auto", CPU, stored)
    assert dtype == chosen
    assert (reason == "") == (stored == "float32")
    assert stored == chosen or stored in reason


def test_what_is_asked_for_is_obeyed_or_refused() -> None:
    assert choose_dtype("float16", CPU) == ("float16", "")
    assert choose_dtype("auto", CUDA, "float16")[0] == "float16"
    with pytest.raises(UsageError, match="'float61'"):
        choose_dtype("float61", CPU)
    assert choose_device("cpu") == CPU
    with pytest.raises(UsageError, match="'tpu'"):
        choose_device("tpu")


def test_no_proc_means_no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: (_ for _ in ()).throw(OSError))
    assert device.cpu_facts() == {}
    assert device.cpu_name()
