"""bench kernels: taking turns, the table's arithmetic, and the command."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur.compile
from secateur.bench import KernelSettings, KernelsResult, kernel_group, kernels, measure_kernels
from secateur.bench.kernel_group import Plan, copies_of
from secateur.bench.kernel_peers import PEERS, PEERS_OF
from secateur.bench.kernel_results import parse_shapes
from secateur.bench.kernel_rounds import Runner, rotation, steps_for, time_rounds
from secateur.cli import kernels_bench_command as command
from secateur.compile import cpu
from secateur.errors import SecateurError, UsageError
from secateur.pattern import Pattern
from secateur.recipe import validate

QUICK = {"rounds": 2, "min_ms": 0.2, "roof_mib": 1, "cache_bytes": 0, "memory_bytes": 2**30}
Command = Callable[..., Any]


class FakeMatrix:
    """A dense float32 matrix that calls itself something else."""

    def __init__(self, weight: np.ndarray, activations: str, nbytes: int, why: str | None) -> None:
        self.weight, self.activations, self.nbytes, self.why = weight, activations, nbytes, why
        self.rows, self.columns = weight.shape
        self.layout = "dense" if why else "fake"

    def matmul(self, x: np.ndarray, bias: Any = None, out: Any = None) -> np.ndarray:
        result = x @ self.weight.T
        if out is not None:
            out[:] = result
        return result

    def rounds_inputs(self, tokens: int) -> bool:
        return self.activations == "int8" and tokens < 3

    def clone(self) -> FakeMatrix:
        return FakeMatrix(self.weight.copy(), self.activations, self.nbytes, self.why)


class FakeKernels:
    """What `secateur.compile.cpu` offers, in numpy."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error
        self.count = 3
        self.counts: list[int] = []
        self.speed = itertools.count(10)

    def pack(
        self,
        values: np.ndarray,
        bitmask: np.ndarray | None,
        shape: tuple[int, int],
        pattern: Any,
        value_type: str,
        *,
        scales: np.ndarray | None = None,
        group_size: int | None = None,
    ) -> FakeMatrix:
        mask = np.ones(shape, dtype=bool)
        nbytes = values.nbytes
        if bitmask is not None:
            bits = np.unpackbits(bitmask, axis=1, count=shape[1], bitorder="little")
            mask = bits.astype(bool).repeat(shape[0] // len(bits), axis=0)
            nbytes += bitmask.nbytes
        Pattern.parse(str(pattern)).check(mask)
        if value_type == "int4":
            nibbles = np.stack([values & 0xF, values >> 4], axis=1).reshape(-1)[: mask.sum()]
            values = (nibbles.astype(np.int8) ^ 8) - 8
        elif value_type == "bf16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        weight = np.zeros(shape, dtype=np.float32)
        weight[mask] = values
        if scales is not None:
            weight *= scales.astype(np.float32).repeat(group_size, axis=1)[:, : shape[1]]
            nbytes += scales.nbytes
        activations = "fp32" if scales is None else "int8"
        why = "too few zeros" if str(pattern) == "50%" else None
        return FakeMatrix(weight * np.float32(1 + self.error), activations, nbytes, why)

    def set_threads(self, count: int, pin: bool = False) -> None:
        self.count = count
        self.counts.append(count)

    def threads(self) -> int:
        return self.count

    def isa(self) -> str:
        return "numpy"

    def read_bandwidth(self, nbytes: int, rounds: int) -> list[float]:
        return [float(next(self.speed)) for _ in range(rounds)]


def settings(**changes: Any) -> KernelSettings:
    return validate(
        KernelSettings,
        QUICK | {"shapes": [(64, 64)], "patterns": ["2:4", "50%@16x1", "50%", "3:5"]} | changes,
        "test",
    )


@pytest.fixture(scope="module")
def measured() -> KernelsResult:
    return measure_kernels(FakeKernels(), settings(tokens=[1, 3]), command="x | y")


def test_every_group_has_control_patterns_and_peers(measured: KernelsResult) -> None:
    assert [(g.values, g.tokens, g.threads, g.rows, g.columns) for g in measured.groups] == [
        (kind, tokens, 1, 64, 64) for kind in ("bf16", "int8", "int4") for tokens in (1, 3)
    ]
    for group in measured.groups:
        peers = PEERS_OF[group.values]
        names = [row.name for row in group.kernels]
        assert names == ["dense", "2:4", "50%@16x1", "50%", "3:5", *peers]
        assert command.references(group) == ["dense", *peers]
        absent = {row.name: row.absent for row in group.kernels if row.absent}
        assert absent == {"3:5": "64 inputs are not a multiple of 5"}
        for row in group.kernels:
            if row.absent is None:
                assert set(row.speedup) == {"dense", *peers} - {row.name}
                assert row.relative_error is not None
                assert row.relative_error < (0.3 if row.name == "ort-int8" else 0.02)
        used = {row.activations for row in group.kernels if row.kind != "peer" and not row.absent}
        assert used == {"int8" if group.values != "bf16" and group.tokens == 1 else "fp32"}
    assert [row.why for row in measured.groups[0].kernels[:4]] == [None] * 3 + ["too few zeros"]


def test_the_arithmetic_of_a_row(measured: KernelsResult) -> None:
    group = next(g for g in measured.groups if g.values == "int4" and g.tokens == 3)
    dense, row = group.kernels[:2]
    assert dense.us is not None
    assert row.us is not None
    assert row.median_us is not None
    assert len(row.us.samples) == 2
    assert row.median_us == pytest.approx(statistics.median(row.us.samples))
    assert row.nbytes == 64 * 64 // 4 + 64 * 64 // 8 + 2 * 64
    assert row.bytes_per_weight == row.nbytes / 4096
    assert row.gb_per_s == pytest.approx(row.nbytes / row.median_us / 1000)
    assert row.gflops == pytest.approx(2 * 3 * 4096 / row.median_us / 1000)
    assert row.roof_fraction == pytest.approx(row.gb_per_s / measured.roofs[0].median)
    ratio = row.speedup["dense"]
    assert ratio.value == pytest.approx(sum(dense.us.samples) / sum(row.us.samples))
    assert ratio.standard_error is not None
    assert row.copies == 2


def test_the_roof_is_read_before_and_after(measured: KernelsResult) -> None:
    (roof,) = measured.roofs
    assert roof.before.samples == (10, 11)
    assert roof.after.samples == (12, 13)
    assert roof.median == 11.5
    assert roof.drift == pytest.approx(12.5 / 10.5)


def test_threads_are_those_of_the_group_and_then_as_before() -> None:
    fake, before = FakeKernels(), torch.get_num_threads()
    seen = []
    peers = ["torch-fp32"]
    few = settings(threads=[1, 2], values=["bf16"], patterns=["2:4"], peers=peers)
    original = kernel_group.time_rounds

    def spy(*arguments: Any) -> Any:
        seen.append((fake.count, torch.get_num_threads()))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_group, "time_rounds", spy)
        result = measure_kernels(fake, few)
    assert seen == [(1, 1), (2, 2)]
    assert [roof.threads for roof in result.roofs] == [1, 2]
    assert (fake.count, torch.get_num_threads()) == (3, before)


def test_the_result_survives_json(measured: KernelsResult) -> None:
    plain = json.loads(json.dumps(measured.to_json()))
    assert plain["schema"] == "secateur/bench-kernels/1"
    assert plain["settings"]["patterns"] == ["2:4", "50%@16x1", "50%", "3:5"]
    assert plain["environment"]["versions"]["onnxruntime"]
    assert KernelsResult.model_validate(plain) == measured


def test_a_wrong_kernel_ends_the_measurement() -> None:
    quick = settings(values=["int8"], patterns=["2:4"], peers=[])
    measure_kernels(FakeKernels(0.01), quick)
    with pytest.raises(SecateurError, match=r"of dense int8 .* is wrong: .* relative error 0\.03"):
        measure_kernels(FakeKernels(0.03), quick)
    with pytest.raises(SecateurError, match="of dense bf16"):
        measure_kernels(FakeKernels(0.01), settings(values=["bf16"], peers=[]))


def test_a_peer_that_is_missing_or_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = settings(values=["int8"], patterns=["2:4"], threads=[1, 2])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for group in measure_kernels(FakeKernels(), quick).groups:
        assert [row.absent for row in group.kernels][2:] == [
            "not installed: onnxruntime (pip install 'secateur[peers]')"
        ] * 2
        assert set(group.kernels[1].speedup) == {"dense"}

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such node\nat all")

    monkeypatch.setattr(kernel_group, "make_peer", fail)
    result = measure_kernels(FakeKernels(), quick)
    assert result.groups[0].kernels[2].absent == "failed: no such node"
    page = command.markdown(result)
    assert page.count("- absent: 64x64 ort-int8 (int8) failed: no such node\n") == 1


def test_copies_fill_the_cache_as_far_as_memory_goes() -> None:
    assert copies_of(100, 1000, 10**6) == 10
    assert copies_of(100, 1001, 10**6) == 11
    assert copies_of(5000, 1000, 10**6) == 2
    assert copies_of(100, 1000, 350) == 5
    assert copies_of(100, 1000, -1) == 2
    assert copies_of(1, 10**9, 10**9) == 4096


def test_memory_is_refused_before_it_is_taken() -> None:
    quick = settings(shapes=[(64, 64), (8192, 8192)], memory_bytes=10**8)
    Plan.of(quick, (64, 64), "int8")
    with pytest.raises(UsageError, match=r"8192x8192 in bf16 takes at least .* GiB"):
        measure_kernels(FakeKernels(), quick)
    result = measure_kernels(
        FakeKernels(), settings(values=["int4"], patterns=[], cache_bytes=10**8)
    )
    assert "4096 copies of 2176 bytes do not fill" in "\n".join(result.notes)


def test_settings_for_this_machine() -> None:
    cold = kernels.resolved(KernelSettings(), 2**20)
    assert cold.cache_bytes == 98 * 2**20
    assert cold.memory_bytes is not None
    assert 0 < cold.memory_bytes <= kernels.free_memory()
    assert kernels.resolved(KernelSettings(), None).cache_bytes == 160 * 2**20
    kept = settings()
    assert kernels.resolved(kept, 2**20) == kept


def test_the_last_level_cache(tmp_path: Path) -> None:
    """Four cores, two caches of level 3 between them."""
    for core in range(4):
        for index, (level, size, shared) in enumerate(
            [
                (1, "32K", f"{core}"),
                (2, "512K", f"{core}"),
                (3, "16M", "0-1" if core < 2 else "2-3"),
            ]
        ):
            directory = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            directory.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (directory / name).write_text(f"{text}\n")
    assert kernels.last_level_cache(tmp_path) == 32 * 2**20
    assert kernels.last_level_cache(tmp_path / "absent") is None


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, seconds: float, calls: int = 1) -> Runner:
        def run(steps: int) -> None:
            self.now += steps * seconds
            self.log.append(name)

        return Runner(run, calls, lambda: np.zeros(1))


def test_a_round_runs_everything_once_in_a_new_order() -> None:
    clock = Clock()
    runners = {name: clock.runner(name, 0.004, i + 1) for i, name in enumerate("abc")}
    samples, calls = time_rounds(runners, 6, 0.02, seed=1, clock=clock)
    rounds = ["".join(clock.log[-3 * i - 3 : len(clock.log) - 3 * i]) for i in range(6)]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 1
    for i, name in enumerate("abc"):
        assert samples[name] == pytest.approx([0.004 / (i + 1)] * 6)
        assert calls[name] % (i + 1) == 0
        assert calls[name] / (i + 1) * 0.004 >= 0.02
    again = Clock()
    time_rounds({n: again.runner(n, 0.004) for n in "abc"}, 6, 0.02, seed=1, clock=again)
    assert again.log[-18:] == clock.log[-18:]


@pytest.mark.parametrize("seconds", [1e-9, 1e-6, 0.003, 0.5])
def test_steps_last_long_enough(seconds: float) -> None:
    clock = Clock()
    steps = steps_for(clock.runner("a", seconds), 0.02, clock)
    assert steps * seconds >= 0.02 * (1 - 1e-9)
    assert steps == 1 or steps * seconds < 0.3


def test_a_rotation_goes_on_where_it_stopped() -> None:
    seen: list[int] = []
    run = rotation(itertools.cycle([lambda i=i: seen.append(i) for i in range(3)]))
    run(2)
    run(3)
    assert seen == [0, 1, 2, 0, 1]


def test_shapes() -> None:
    assert parse_shapes(["8x16", "smollm2", "576x576"])[:2] == [(8, 16), (576, 576)]
    assert len(parse_shapes(["smollm2", "576x576"])) == 4
    for wrong in ("8", "0x8", "8x", "gpt"):
        with pytest.raises(UsageError, match="is not understood"):
            parse_shapes([wrong])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": [0]}, "must be 1 or more"),
        ({"rounds": 1}, "rounds = 1"),
        ({"peers": ["torch-fp23"]}, "did you mean 'torch-fp32'"),
        ({"values": ["int5"]}, "int5"),
        ({"group_size": 48}, "48"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        settings(**changes)


def test_what_is_named_twice_counts_once() -> None:
    twice = settings(patterns=["2:4", "dense", "2:4"], tokens=[1, 1], peers=["ort-fp32"] * 2)
    assert (twice.patterns, twice.tokens) == ((Pattern.parse("2:4"),), (1,))
    assert twice.peers == ("ort-fp32",)


def test_markdown(measured: KernelsResult) -> None:
    page = command.markdown(measured).splitlines()
    assert page[0] == "# CPU kernels compared"
    assert "- command: x | y" in page
    assert "- note: 64x64 50% (bf16, int8, int4) is stored dense: too few zeros" in page
    assert "- absent: 64x64 3:5 (bf16, int8, int4) 64 inputs are not a multiple of 5" in page
    titles = [line for line in page if line.startswith("## ")]
    assert titles[0] == "## 64 x 64, 1 token, 1 thread, bf16"
    assert titles[-1] == "## 64 x 64, 3 tokens, 1 thread, int4"
    start = page.index(titles[-1])
    head = [cell.strip() for cell in page[start + 2].split("|")[1:-1]]
    assert head == ["kernel", *command.TITLES, "x dense", "x ort-nbits4"]
    row = [cell.strip() for cell in page[start + 5].split("|")[1:-1]]
    own = measured.groups[-1].kernels[1]
    assert len(row) == len(head)
    assert row[:3] == ["2:4", "fake", "fp32"]
    assert row[head.index("B/weight")] == "0.406"
    assert row[-1] == (
        f"{own.speedup['ort-nbits4'].value:.2f} ± {own.speedup['ort-nbits4'].standard_error:.2f}"
    )
    absent = [cell.strip() for cell in page[start + 8].split("|")[1:-1]]
    assert absent[0] == "3:5"
    assert absent[head.index("µs")] == "absent"


def test_the_table_on_the_terminal(
    measured: KernelsResult, capsys: pytest.CaptureFixture[str]
) -> None:
    command.show_kernels(measured)
    shown = capsys.readouterr().out
    assert "64 x 64, 3 tokens, 1 thread, int8" in shown
    assert "x ort-nbits8" in shown
    assert "roof: 1 thread read 1 MiB at 11.5 GB/s (before 10.5 ± 0.7, after 12.5 ± 0.7" in shown
    assert "ONNX Runtime's do not spin (allow_spinning 0)" in shown


ARGUMENTS = [
    *("bench", "kernels", "--shapes", "64x64", "--tokens", "1,5", "--threads", "1"),
    *("--rounds", "2", "--min-ms", "1", "--cache-mib", "0", "--roof-mib", "1"),
]


def test_the_command_from_end_to_end(secateur_command: Command, tmp_path: Path) -> None:
    """Our real kernels, against everything."""
    output, page = tmp_path / "out.json", tmp_path / "out.md"
    ran = secateur_command(*ARGUMENTS, "--json", "-o", output, "--markdown", page)
    assert ran.returncode == 0, ran.stderr
    result = KernelsResult.model_validate_json(output.read_text())
    assert json.loads(ran.stdout) == result.to_json()
    assert [(group.values, group.tokens) for group in result.groups] == [
        (kind, tokens) for kind in ("bf16", "int8", "int4") for tokens in (1, 5)
    ]
    for group in result.groups:
        assert len(group.kernels) == 1 + 9 + len(PEERS_OF[group.values])
        assert not [row for row in group.kernels if row.absent]
    assert page.read_text() == command.markdown(result)
    assert "groups: 6/6" in ran.stderr


def test_the_flags_of_the_command(
    secateur_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secateur.compile, "cpu", FakeKernels())
    few = [*ARGUMENTS, "--patterns", "2:4", "--values", "bf16", "--memory", "1GiB", "-q"]
    ran = secateur_command(*few, "--peers", "none")
    assert ran.returncode == 0, ran.stderr
    assert "x dense" in ran.stdout
    assert "torch-fp32" not in ran.stdout
    assert ran.stderr == ""
    ran = secateur_command(*few, "--peers", ",".join(PEERS), "--spin", "--json")
    result = KernelsResult.model_validate_json(ran.stdout)
    assert [row.name for row in result.groups[0].kernels][2:] == list(PEERS)
    assert result.settings.spin
    assert result.settings.memory_bytes == 2**30
    for flag, value in (
        ("--tokens", "a"),
        ("--shapes", "x"),
        ("--memory", "1"),
        ("--peers", "x"),
        ("--output", "/absent/x.json"),
        ("--patterns", "4:2"),
    ):
        assert secateur_command(*few, flag, value).returncode == 2, flag


def test_without_kernels_the_command_says_so(
    secateur_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_kernels", None)
    ran = secateur_command(*ARGUMENTS)
    assert ran.returncode == 4
    assert "native kernels are not built" in ran.stderr


def test_defaults_are_those_of_the_settings() -> None:
    import inspect

    flags = inspect.signature(command.kernels).parameters
    known = KernelSettings()
    for name in ("rounds", "min_ms", "group_size", "roof_mib", "seed", "spin"):
        assert flags[name].default == getattr(known, name), name
    assert flags["patterns"].default == ",".join(map(str, known.patterns))
    assert flags["values"].default == ",".join(known.values)
    assert flags["tokens"].default == ",".join(map(str, known.tokens))
    assert parse_shapes([flags["shapes"].default]) == list(known.shapes)
