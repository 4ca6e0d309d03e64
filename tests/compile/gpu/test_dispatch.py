"""The rule that says which kernel computes when, and where its crossover is from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.compile.gpu import crossover, machine
from secateur.compile.gpu.dispatch import CROSSOVER, NAMES, Machine, Plan, Weight, choose
from secateur.errors import UsageError
from secateur.pattern import Pattern

NO_CUTLASS: Any = {"cutlass": "torch has it for compute capability 8.x, and this is 9.0"}
NO_LT: Any = {"cusparselt": "torch was built without it"}
NO_OWN: Any = dict.fromkeys(("own", "own-fp8"), "it was not built")
NO_FP8: Any = dict.fromkeys(("own-fp8", "cusparselt-fp8", "scaled-mm"), "needs 8.9")
A100, H100 = Machine((8, 0), NO_OWN | NO_FP8), Machine((9, 0), NO_OWN | NO_CUTLASS)
BUILT = Machine((9, 0), NO_CUTLASS)
NO_SPARSE = Machine((8, 9), NO_OWN | {"cusparselt-fp8": "a trial product failed"})
TENSOR_CORES = "sparse tensor cores take 2:4, not"
SCALES = "sparse tensor cores know no group scales, which"


def weight(
    pattern: str = "2:4", values: Any = "bf16", rows: int = 4096, columns: int = 4096, **more: Any
) -> Weight:
    chosen = Pattern.parse(pattern)
    kept = chosen.n / chosen.m if chosen.is_nm else 1 - float(chosen.removed)
    dtype = more.get("dtype", values if values in ("bf16", "fp16") else "bf16")
    rounds = more.get("round_inputs", True)
    return Weight(rows, columns, chosen, kept, values, dtype, rounds)


# weight, machine, what computes 1, 2, 16, 17, 64 and 65 tokens, the start of the reason
TABLE = [
    (weight(), A100, "T T T T T C", None),
    (weight(values="fp16"), A100, "T T T T T C", None),
    (weight(), H100, "T T T T T L", None),
    (weight(), Machine((8, 9), NO_OWN | NO_LT), "T T T T T C", None),
    (weight(), Machine((8, 6), NO_OWN | {"cutlass": "broken"}), "T T T T T L", None),
    (
        weight(),
        Machine((9, 0), NO_OWN | NO_CUTLASS | NO_LT),
        "T T T T T U",
        "no secateur's CUTLASS: it was not built; no cuSPARSELt: torch was built without it; no "
        "torch's CUTLASS: torch has",
    ),
    (weight(), BUILT, "T O O O O O", None),
    (weight(), Machine((8, 0)), "T O O O O O", None),
    (weight(rows=36, columns=44), BUILT, "T O O O O O", None),
    (weight("2:4", "int8"), BUILT, "T T T T T U", f"{SCALES} int8 values have"),
    (weight(rows=36, columns=44), A100, "T T T T T C", None),
    (weight(rows=36, columns=44), H100, "T T T T T U", "no secateur's CUTLASS"),
    (weight("2:4", "int8"), A100, "T T T T T U", f"{SCALES} int8 values have"),
    (weight("2:4", "int4"), H100, "T T T T T U", f"{SCALES} int4 values have"),
    (weight("50%"), A100, "T T T T T U", f"{TENSOR_CORES} 50%"),
    (weight("4:8"), H100, "T T T T T U", f"{TENSOR_CORES} 4:8"),
    (weight("2:4@16x1"), A100, "T T T T T U", f"{TENSOR_CORES} 2:4@16x1"),
    (weight("1:4", "int4"), A100, "T T T T T U", f"{TENSOR_CORES} 1:4"),
    (weight("dense", "int4"), A100, "D D D D D D", "no weight was removed"),
    (weight("10%"), A100, "D D D D D D", "the packed form takes 96 % of the dense bytes"),
    (weight("10%", "int8"), A100, "T T T T T U", f"{TENSOR_CORES} 10%"),
    (weight(values="fp32", dtype="fp32"), A100, "D D D D D D", "the kernels take bf16 and fp16"),
    (weight(values="int8", dtype="fp32"), A100, "D D D D D D", "the kernels take bf16 and fp16"),
    (weight(values="fp8"), BUILT, "T T T o o o", None),
    (weight(values="fp8", dtype="fp16"), BUILT, "T T T o o o", None),
    (weight(values="fp8"), H100, "T T T l l l", None),
    (weight(values="fp8"), NO_SPARSE, "T T T T T S", None),
    (weight("50%", "fp8"), H100, "T T T T T S", None),
    (weight("50%", "fp8", 4096, 4100), H100, "T T T T T U", f"{TENSOR_CORES} 50%; 4096x4100 is no"),
    (
        weight("50%", "fp8", dtype="fp16"),
        H100,
        "T T T T T U",
        f"{TENSOR_CORES} 50%; torch._scaled_mm with scales of rows gives bf16, not fp16",
    ),
    (weight(values="fp8"), A100, "T T T T T U", "no secateur's CUTLASS with inputs in fp8: needs"),
    (weight(values="fp8", round_inputs=False), H100, "T T T T T U", "inputs are not to be rounded"),
    (weight("dense", "fp8"), H100, "D D D D D D", "no weight was removed"),
    (weight(), Machine((7, 5)), "D D D D D D", "the kernels need compute capability 8.0"),
    (weight(), Machine((8, 0), {"triton": "it is not there"}), "D D D D D D", "it is not there"),
]
LETTERS = {"T": "triton", "C": "cutlass", "L": "cusparselt", "U": "unpack", "D": "dense"}
LETTERS |= {"O": "own", "o": "own-fp8", "l": "cusparselt-fp8", "S": "scaled-mm"}


@pytest.mark.parametrize(("given", "machine", "ends", "why"), TABLE)
def test_the_rule(given: Weight, machine: Machine, ends: str, why: str | None) -> None:
    plan = choose(given, machine)
    found = [plan.at(tokens) for tokens in (1, 2, 16, 17, 64, 65)]
    assert found == [LETTERS[letter] for letter in ends.split()]
    assert (plan.why or "").startswith(why or "")
    assert (plan.why is None) == (why is None)


@given(tokens=st.integers(0, 1000), up_to=st.integers(0, 1000))
def test_a_given_crossover_is_obeyed(tokens: int, up_to: int) -> None:
    plan = choose(weight(), H100, up_to)
    assert plan.at(tokens) == ("triton" if tokens <= up_to else "cusparselt")
    assert choose(weight("dense"), H100, up_to).at(tokens) == "dense"


def test_plans_in_words() -> None:
    assert str(choose(weight(), H100)) == (
        "Triton up to 64 tokens, cuSPARSELt above (built-in crossover)"
    )
    assert str(choose(weight(), A100, 96, "measured")) == (
        "Triton up to 96 tokens, torch's CUTLASS above (measured crossover)"
    )
    assert str(choose(weight(), A100, 0)) == "torch's CUTLASS"
    assert str(choose(weight("2:4", "int4"), A100)) == (
        "Triton up to 64 tokens, cuBLAS on the weight unpacked for each call above (built-in "
        "crossover): sparse tensor cores know no group scales, which int4 values have"
    )
    assert str(weight(rows=14336)) == "2:4 bf16 14336x4096"
    assert set(CROSSOVER) < set(NAMES)


PLAN = Plan("triton", "cusparselt", 64)


@pytest.mark.parametrize(
    ("small", "dense", "found"),
    [
        ([1, 2, 3, 9], 5, 16),  # loses at 32
        ([1, 9, 1, 1], 5, 1),  # loses at 8, whatever comes after
        ([6, 9, 9, 9], 7, 0),
        ([6, 1, 1, 1], 4.9, None),  # dense is faster with one token
        ([1, 1, 1, 1], 5, 32),
    ],
)
def test_the_crossover_is_where_triton_first_loses(
    small: list[float], dense: float, found: int | None
) -> None:
    times: Any = {
        tokens: {"triton": one, "cusparselt": 5.0, "dense": dense}
        for tokens, one in zip((1, 8, 16, 32), small, strict=True)
    }
    assert crossover.crossover_of(times, PLAN) == found


def test_timing_stops_where_triton_has_lost() -> None:
    asked = []

    def milliseconds(end: Any, tokens: int) -> float:
        asked.append((end, tokens))
        return {"triton": tokens / 32, "cusparselt": 1.2, "dense": 2.0}[end]

    times = crossover.time_plan(PLAN, milliseconds)
    assert crossover.crossover_of(times, PLAN) == 32
    assert max(tokens for _, tokens in asked) == 48
    assert [tokens for end, tokens in asked if end == "dense"] == [1]


def test_measured_crossovers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    file = crossover.cache_file()
    assert crossover.read_cache(file) == {}
    crossover.write_cache(file, {"a": 64, "b": None, "c": 0})
    assert crossover.read_cache(file) == {"a": 64, "b": None, "c": 0}
    assert [found.name for found in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": "secateur/crossover/2", "tokens": {"a": 64}}', '{"tokens": 3}'],
)
def test_a_file_that_is_not_ours_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "crossover.json").write_text(text)
    assert crossover.read_cache(tmp_path / "crossover.json") == {}


def test_absurd_entries_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "crossover.json"
    content = {"schema": "secateur/crossover/1", "tokens": {"a": 64, "b": -3, "c": "64", "d": [1]}}
    file.write_text(json.dumps(content))
    assert crossover.read_cache(file) == {"a": 64}


def test_a_folder_that_cannot_be_written_to_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "secateur").write_text("a file where the folder should be")
    crossover.write_cache(tmp_path / "secateur" / "crossover.json", {"a": 64})
    assert (tmp_path / "secateur").is_file()


@pytest.mark.parametrize(
    ("text", "wish"),
    [("", "measure"), ("measure", "measure"), ("built-in", "built-in"), ("0", 0), ("96", 96)],
)
def test_what_the_environment_asks_for(
    monkeypatch: pytest.MonkeyPatch, text: str, wish: object
) -> None:
    monkeypatch.setenv("SECATEUR_CROSSOVER", text)
    assert crossover.wish() == wish


@pytest.mark.parametrize("text", ["-1", "fast", "6.5", "٣"])
def test_what_it_cannot_ask_for(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SECATEUR_CROSSOVER", text)
    with pytest.raises(UsageError, match="write measure, built-in or a number of tokens"):
        crossover.wish()


def test_the_doctor_says_what_is_there_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.diagnosis() == {"gpu kernels": "no CUDA device; triton is installed"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "read", lambda _: H100)
    assert machine.diagnosis() == {
        "gpu triton": "can be used",
        "gpu own": "not used: it was not built",
        "gpu cutlass": f"not used: {NO_CUTLASS['cutlass']}",
        "gpu cusparselt": "can be used",
        "gpu own-fp8": "not used: it was not built",
        "gpu cusparselt-fp8": "can be used",
        "gpu scaled-mm": "can be used",
        "gpu 2:4 bf16": "Triton up to 64 tokens, cuSPARSELt above (built-in crossover)",
        "gpu 2:4 int4": str(choose(weight("2:4", "int4"), H100)),
        "gpu 2:4 fp8": "Triton up to 16 tokens, cuSPARSELt with inputs in fp8 above (built-in "
        "crossover)",
        "gpu 50% bf16": str(choose(weight("50%"), H100)),
    }


@pytest.mark.parametrize("capability", [(9, 0), (8, 6)])
def test_the_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(machine, "_trial", lambda end, _: f"{end} has a fault")
    machine.read.cache_clear()
    facts = machine.read(device)
    machine.read.cache_clear()
    assert facts.capability == capability
    if capability == (9, 0):
        assert facts.absent["cutlass"].endswith("capability 8.x, and this is 9.0")
        assert facts.absent["scaled-mm"] == "scaled-mm has a fault"
        assert facts.absent["own-fp8"] == "own-fp8 has a fault"
    else:
        assert facts.absent["cutlass"] == "cutlass has a fault"
        assert facts.absent["scaled-mm"].endswith("8.9 on, and this is 8.6")
        assert facts.absent["own-fp8"] == facts.absent["scaled-mm"]
    assert facts.absent["own"] == "own has a fault"
    built = torch.backends.cusparselt.is_available()
    assert facts.absent["cusparselt"] == (
        "cusparselt has a fault" if built else f"torch {torch.__version__} was built without it"
    )
