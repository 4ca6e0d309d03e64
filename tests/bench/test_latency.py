"""Latency: the order of the rounds, the statistics and the warnings, with clocks that we turn."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from secateur.bench import LatencyResult, measure_latency, model_bytes
from secateur.bench.latency import interleave, warnings_on
from secateur.bench.results import Estimate, Spread
from secateur.bench.runners import Runner, Timing
from secateur.errors import EnvironmentFault, ModelError
from secateur.recipe import Latency

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
