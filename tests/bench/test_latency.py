"""Latency: the order of the rounds, the statistics and the warnings, with clocks that we turn."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from secateur.bench import LatencyResult, measure_latency, model_bytes
from secateur.bench.energy import EnergyMeter
from secateur.bench.latency import interleave, warnings_on
from secateur.bench.latency_results import ModelLatency, PointLatency, find_crossovers
from secateur.bench.results import Estimate, Spread
from secateur.bench.runners import Runner, Timing
from secateur.errors import EnvironmentFault, ModelError, UsageError
from secateur.recipe import Latency, validate
from secateur.serve.native.model import NativeModel
from secateur.serve.native.step import Batch

QUICK = Latency(prompt=8, new_tokens=3, batch=2, rounds=3, min_seconds=0)


class Clock:
    """Time that passes only while a runner runs, and a record of who ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, seconds: float) -> Runner:
        def run() -> Timing:
            self.ran.append(name)
            self.now += seconds
            return Timing(prefill=seconds / 4, decode=seconds * 3 / 4)

        return run


def test_rounds_alternate_their_order() -> None:
    clock = Clock()
    runners = [clock.runner("A", 1), clock.runner("B", 2), clock.runner("C", 3)]
    timings = interleave(runners, 3, 0, clock=clock)
    assert "".join(clock.ran) == "ABC" "CBA" "ABC"  # fmt: skip
    assert [[timing.prefill for timing in own] for own in timings] == [
        [0.25] * 3,
        [0.5] * 3,
        [0.75] * 3,
    ]


@pytest.mark.parametrize(("rounds", "seconds", "expected"), [(2, 10, 4), (7, 10, 7), (5, 0, 5)])
def test_rounds_and_seconds_are_both_minima(rounds: int, seconds: float, expected: int) -> None:
    clock, ticks = Clock(), list[tuple[int, int]]()
    runners = [clock.runner("A", 1), clock.runner("B", 2)]
    timings = interleave(
        runners, rounds, seconds, clock=clock, progress=lambda *tick: ticks.append(tick)
    )
    assert [len(own) for own in timings] == [expected, expected]
    assert ticks == [(done, expected) for done in range(1, expected + 1)]


def test_a_ratio_and_its_error_by_hand() -> None:
    # R = 9/6 = 1.5; residuals (x - 1.5 y)/2 = (.25, 0, -.25); σ = .25; σ/√3
    estimate = Estimate.of([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert estimate.value == 1.5
    assert estimate.stddev == pytest.approx(0.25)
    assert estimate.standard_error == pytest.approx(0.25 / math.sqrt(3))
    assert Estimate.of([2.0], [1.0]).stddev is None


def test_the_ratio_error_is_the_propagated_one_with_covariance() -> None:
    draw = np.random.default_rng(0)
    y = 10 + draw.normal(size=50)
    x = 2 * y + 0.1 * draw.normal(size=50)
    estimate = Estimate.of(x.tolist(), y.tolist())
    covariance = np.cov(x, y, ddof=1)
    relative = (
        covariance[0, 0] / x.mean() ** 2
        + covariance[1, 1] / y.mean() ** 2
        - 2 * covariance[0, 1] / (x.mean() * y.mean())
    )
    assert estimate.value == pytest.approx(x.mean() / y.mean())
    assert estimate.stddev == pytest.approx(estimate.value * math.sqrt(relative))
    assert estimate.stddev == pytest.approx(np.std(x / y, ddof=1), rel=0.02)  # of paired ratios


def test_a_slowdown_of_both_models_does_not_count_against_the_ratio() -> None:
    estimate = Estimate.of([20.0, 10.0, 5.0], [10.0, 5.0, 2.5])
    assert (estimate.value, estimate.stddev) == (2.0, 0.0)


def test_spread() -> None:
    spread = Spread.of([1.0, 2.0, 6.0])
    assert (spread.mean, spread.min, spread.max) == (3.0, 1.0, 6.0)
    assert spread.stddev == pytest.approx(math.sqrt(7))
    assert spread.samples == (1.0, 2.0, 6.0)


def test_warnings() -> None:
    steady = [1.0, 1.01, 0.99, 1.0, 1.02]
    assert warnings_on("decode", steady) == []
    assert warnings_on("decode", [1.0, 1.0, 1.04, 1.0]) == []  # exact, but 4 % is nothing
    (first,) = warnings_on("decode", [2.0, *steady])
    assert first.startswith("decode: the first round was slow (2 s, median 1 s)")
    (later,) = warnings_on("prefill", [*steady, 2.0, 0.5])
    assert later.startswith("prefill: 2 of 7 rounds far from the median")
    assert "1 of 6" in warnings_on("decode", [0.5, *steady])[0]  # first, but fast


def test_measuring_tiny_models(dense: Path, sparse: Path) -> None:
    threads = torch.get_num_threads()
    result = measure_latency([sparse], QUICK, against=dense, dtype="float32", threads=1)
    assert torch.get_num_threads() == threads
    assert result.environment.threads == 1
    assert result.rounds == 3
    assert result.baseline is not None
    (model,) = result.models
    (point,), (base,) = model.points, result.baseline.points
    assert (point.prompt, point.batch) == (8, 2)
    assert len(point.decode_tokens_per_s.samples) == 3
    assert point.decode_speedup is not None
    assert point.decode_speedup.value == pytest.approx(
        point.decode_tokens_per_s.mean / base.decode_tokens_per_s.mean
    )
    assert base.prefill_speedup is None
    assert model.bytes == model_bytes(sparse) == (sparse / "model.safetensors").stat().st_size
    assert model.memory_bytes > 0
    assert model.modules["Linear"] == 15
    assert result.peak_rss_bytes > 2**20
    plain = json.loads(json.dumps(result.to_json()))
    assert plain["schema"] == "secateur/bench-latency/3"
    assert LatencyResult.model_validate(plain) == result


def test_a_run_is_a_prefill_and_single_token_steps(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[int, ...], int]] = []
    generated: list[torch.Tensor] = []
    forward = LlamaForCausalLM.forward

    def recorded(self, input_ids, logits_to_keep=0, **keywords):  # type: ignore[no-untyped-def]
        output = forward(self, input_ids=input_ids, logits_to_keep=logits_to_keep, **keywords)
        calls.append((tuple(input_ids.shape), logits_to_keep))
        generated.append(input_ids)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", recorded)
    measure_latency([dense], QUICK, dtype="float32")
    assert calls == [((2, 8), 1), ((2, 1), 1), ((2, 1), 1), ((2, 1), 1)] * 4  # warm-up + 3 rounds
    monkeypatch.undo()
    prompt = generated[0]
    reference = AutoModelForCausalLM.from_pretrained(dense).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(torch.cat(generated[1:4], dim=1), reference[:, 8:])  # the cache is used


def test_notes_name_what_the_numbers_depend_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = shutil.copytree(dense, tmp_path / "pruned")
    manifest = {"schema": "secateur/manifest/1", "kind": "pruned", "source": {}, "recipe": {}}
    (pruned / "manifest.json").write_text(json.dumps({**manifest, "layers": {}}))
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    notes = measure_latency([pruned], QUICK, engine="transformers", device="cpu").notes
    assert any("computed in" in note for note in notes)
    assert any("pruned but not compiled" in note for note in notes)
    assert any("busy before the measurement" in note for note in notes)


def test_absent_cuda_is_said(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match="no CUDA device"):
        measure_latency([dense], QUICK, device="cuda")


def test_more_tokens_than_the_model_reads_are_refused(dense: Path) -> None:
    with pytest.raises(ModelError, match="at most 64 tokens at once, 65 are asked"):
        measure_latency([dense], Latency(prompt=60, new_tokens=5))


def curve(*points: tuple[int, int, float, float]) -> ModelLatency:
    """A model with these points: prompt, batch, prefill speed-up, decode speed-up."""
    rate = Spread.of([1.0, 1.0])

    def ratio(value: float) -> Estimate:
        return Estimate(value=value, stddev=None, standard_error=None)

    made = tuple(
        PointLatency(
            prompt=prompt,
            batch=batch,
            prefill_tokens_per_s=rate,
            decode_tokens_per_s=rate,
            prefill_speedup=ratio(prefill),
            decode_speedup=ratio(decode),
            joules=None,
            warnings=(),
        )
        for prompt, batch, prefill, decode in points
    )
    return ModelLatency(
        path="m", engine="native", bytes=1, memory_bytes=1, modules={}, points=made, layers=()
    )


def test_crossovers_by_hand() -> None:
    # Decode falls from 1.5 through 1 half way (in the logarithm) between 2 and 8: at 4.
    model = curve((8, 1, 0.9, 2.0), (8, 8, 0.9, 0.5), (8, 2, 0.9, 1.5), (64, 1, 0.8, 2.0))
    (one,) = find_crossovers([model])
    assert (one.phase, one.prompt, one.faster) == ("decode", 8, "below")
    assert one.batch == pytest.approx(4.0)
    (other,) = find_crossovers([curve((8, 1, 0.5, 3.0), (8, 16, 1.5, 3.0))])
    assert (other.phase, other.faster, other.batch) == ("prefill", "above", pytest.approx(4.0))


def test_every_pair_of_prompt_and_batch_is_a_point(dense: Path, sparse: Path) -> None:
    loads = Latency.model_validate(
        {"prompt": "4,8", "batch": [1, 2], "new_tokens": 2, "rounds": 2, "min_seconds": 0}
    )
    result = measure_latency([sparse], loads, against=dense, threads=1, layers=True)
    assert (result.prompt, result.batch, result.energy != "") == ((4, 8), (1, 2), True)
    for model in result.everyone:
        assert [(p.prompt, p.batch) for p in model.points] == [(4, 1), (4, 2), (8, 1), (8, 2)]
        assert all(len(point.decode_tokens_per_s.samples) == 2 for point in model.points)
        for tokens in (1, 2):
            layers = [one for one in model.layers if one.tokens == tokens]
            assert len(layers) == 15
            assert sum(one.nbytes for one in layers) == model.memory_bytes
            assert all(len(one.us.samples) == 2 and one.us.min > 0 for one in layers)
    (down,) = [one for one in result.models[0].layers if "1.mlp.down_proj" in one.name][:1]
    assert (down.rows, down.columns, down.layout, down.values) == (32, 48, "dense", "fp32")
    with pytest.raises(UsageError, match="prompt"):
        validate(Latency, {"prompt": "4,x"}, "here")


def test_layers_of_transformers(dense: Path) -> None:
    layers = (
        measure_latency([dense], QUICK, engine="transformers", layers=True, dtype="float32")
        .models[0]
        .layers
    )
    assert {one.layout for one in layers} == {"torch"}
    assert len(layers) == 15
    head = next(one for one in layers if one.name == "lm_head")
    assert (head.rows, head.columns, head.nbytes, head.tokens) == (258, 32, 258 * 32 * 4, 2)


def zone(root: Path, name: str, uj: int, whole: int = 1000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{whole}\n")
    return folder


def test_energy_of_packages_wraps_around(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", 900_000), zone(tmp_path, "intel-rapl:1", 5)
    zone(tmp_path, "intel-rapl:0:0", 1)  # a part of the first, which counts it already
    meter = EnergyMeter(tmp_path)
    assert (meter.obstacle, meter.read()) == (None, 0.0)
    (first / "energy_uj").write_text("100000")  # 100 mJ to the end, 100 from the beginning
    (second / "energy_uj").write_text("500005")
    assert meter.read() == pytest.approx(0.7)
    (first / "energy_uj").write_text("300000")
    assert meter.read() == pytest.approx(0.9)
    assert "2 package" in meter.description
    none = EnergyMeter(tmp_path / "absent")
    assert none.read() is None
    assert "counts no energy" in none.description
    (first / "energy_uj").write_text("much")
    assert "cannot be read" in EnergyMeter(tmp_path).description


def test_joules_of_each_run(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = zone(tmp_path, "intel-rapl:0", 0, whole=10**9)
    monkeypatch.setattr("secateur.bench.latency.EnergyMeter", lambda: EnergyMeter(tmp_path))
    step = NativeModel.step

    def costly(model: NativeModel, batch: Batch) -> Any:
        used = int((package / "energy_uj").read_text())
        (package / "energy_uj").write_text(str(used + 250_000))
        return step(model, batch)

    monkeypatch.setattr(NativeModel, "step", costly)
    result = measure_latency([dense], QUICK, threads=1)  # a step of prefill and three of decoding
    joules = result.models[0].points[0].joules
    assert joules is not None
    assert joules.samples == pytest.approx((1.0,) * 3)
    assert result.energy.startswith("RAPL")
