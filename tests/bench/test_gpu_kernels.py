"""bench kernels --device cuda, with interpreted kernels and a CPU in the GPU's place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from secateur.bench.gpu_kernels import Device, GpuKernelsResult, measure_gpu_kernels
from secateur.bench.kernel_results import KernelSettings
from secateur.cli import kernels_bench_command as command
from secateur.compile.gpu.held import hold_each
from secateur.errors import SecateurError
from secateur.recipe import validate

Command = Callable[..., Any]
PLAYED = Device(torch.device("cpu"), 0, time.perf_counter, lambda call: call)


def settings(**own: Any) -> KernelSettings:
    content = {"shapes": [(64, 64)], "patterns": ["2:4", "4:6"], "values": ["bf16", "int4", "fp8"]}
    content |= {"tokens": (1, 2), "rounds": 2, "min_ms": 0.01, "group_size": 64} | own
    return validate(KernelSettings, content, "test")


@pytest.fixture(scope="module")
def result() -> GpuKernelsResult:
    return measure_gpu_kernels(hold_each, settings(), PLAYED, command="secateur bench kernels")


def test_back_ends_are_checked_and_compared(result: GpuKernelsResult) -> None:
    assert [group.title for group in result.groups] == [
        "64 x 64, 1 token, bf16",
        "64 x 64, 2 tokens, bf16",
        "64 x 64, 1 token, int4",
        "64 x 64, 2 tokens, int4",
        "64 x 64, 1 token, fp8",
        "64 x 64, 2 tokens, fp8",
    ]
    for group in result.groups:
        rows = {row.name: row for row in group.kernels}
        large = ["own", "cutlass", "cusparselt"]
        if group.values == "fp8":
            large = ["own-fp8", "cusparselt-fp8", "scaled-mm"]
        ends = [f"2:4 {end}" for end in ("triton", "unpack", *large)]
        assert list(rows) == ["dense", *ends, "4:6"]
        assert rows["4:6"].absent == "64 inputs are not a multiple of 6"
        assert all(rows[f"2:4 {end}"].absent is not None for end in large)
        triton = rows["2:4 triton"]
        assert triton.relative_error is not None
        assert 0 < triton.relative_error < 0.02
        # A block of floats is 128 columns wide.
        each = {"bf16": 2 * 1.125, "int4": 0.375 + 2 / 64, "fp8": 2 * 0.625 + 4 / 64}[group.values]
        assert triton.bytes_per_weight == each
        assert triton.copies == 2
        assert triton.us is not None
        assert len(triton.us.samples) == 2
        assert rows["dense"].us is not None
        ratio = sum(rows["dense"].us.samples) / sum(triton.us.samples)
        assert triton.speedup["dense"].value == pytest.approx(ratio)


def test_the_result_is_json_and_a_table(
    result: GpuKernelsResult, capsys: pytest.CaptureFixture[str]
) -> None:
    again = GpuKernelsResult.model_validate_json(json.dumps(result.to_json()))
    assert again == result
    command.show_kernels(result)
    shown = capsys.readouterr().out
    assert "2:4 triton" in shown
    assert "absent: 64x64 2:4 cutlass (bf16) no torch's CUTLASS: this is no GPU" in shown
    assert "## 64 x 64, 2 tokens, int4" in command.markdown(result)


def test_a_wrong_product_ends_the_measurement() -> None:
    class Wrong:
        nbytes = 1

        def multiply(self, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            return x.new_zeros(len(x), 64)

    with pytest.raises(SecateurError, match="triton is wrong: 2:4 bf16, 64x64"):
        measure_gpu_kernels(lambda *_, **__: {"triton": Wrong()}, settings(), PLAYED)


def test_without_a_gpu_it_says_so(
    secateur_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = secateur_command("bench", "kernels", "--device", "cuda")
    assert done.returncode == 4
    assert "this machine has no CUDA device" in done.stderr
