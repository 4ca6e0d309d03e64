"""Memory budgets: what is planned, and that the result is the same within any of them."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.bench.processes import run_process
from secateur.checkpoint import Checkpoint
from secateur.errors import UsageError
from secateur.model import StreamedModel
from secateur.pattern import Pattern
from secateur.prune import find_method, memory, plan, prune_model
from secateur.prune.block import Block
from secateur.prune.memory import MemoryPlan, plan_memory
from secateur.prune.method import Method
from secateur.recipe import Calibration, Prune
from secateur.sizes import parse_size
from secateur.statistics import InputStatistics
from secateur.walk import Walk

SAMPLES, LENGTH = 4, 24
BASE = 100 * 2**20  # what the process is said to hold before anything is done
METHODS = ["wanda", "sparsegpt", "gblm", "wandapp", "sparsegpt+blockwise"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("1.5 GiB", 3 * 2**29),
        ("800MB", 800 * 10**6),
        ("64KiB", 2**16),
        (" 3 kb ", 3000),
        ("2tb", 2 * 10**12),
        ("1TiB", 2**40),
        ("5B", 5),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "2", "GiB", "-1GiB", "2G", "1,5GiB", "2 GiB!", "1e3MB", "5iB"]
)
def test_what_is_no_size(text: str, tiny: Path) -> None:
    with pytest.raises(UsageError, match="is not understood") as refusal:
        parse_size(text)
    assert "2GiB" in refusal.value.fix
    with pytest.raises(UsageError, match="is not understood"):
        plan(str(tiny), Prune(memory=text), Calibration())


@pytest.fixture(autouse=True)
def _known_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: BASE)


def recipe(method: str, budget: int | None = None) -> Prune:
    pattern = Pattern.parse("50%" if method == "sparsegpt" else "2:4")
    size = None if budget is None else f"{budget}B"
    return Prune(method=method, pattern=pattern, memory=size, device="cpu")


class Planner:
    """Memory plans of one model and method by budget."""

    def __init__(self, path: Path, method: str, length: int = LENGTH) -> None:
        self.model = StreamedModel(Checkpoint(path), torch.device("cpu"), torch.float32)
        self.layers = plan(str(path), recipe(method), Calibration()).layers
        self.method: Method = find_method(method)
        self.length = length

    def __call__(self, budget: int | None) -> MemoryPlan:
        return plan_memory(self.model, self.layers, self.method, SAMPLES, self.length, budget)

    def least(self) -> int:
        """The smallest budget that is not refused."""
        low, high = BASE, self(None).peak_bytes
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self(middle)
                high = middle
            except UsageError:
                low = middle
        return high


@pytest.mark.parametrize("method", METHODS)
def test_everything_in_memory_where_there_is_enough(
    method: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner(tiny, method)
    ample = planner(None)
    names = [list(planner.model.linears(block)) for block in range(2)]
    assert ample == MemoryPlan(False, [[own] for own in names], ample.peak_bytes)
    assert planner(ample.peak_bytes) == ample == planner(2**60)
    assert planner(ample.peak_bytes - 1).spill
    monkeypatch.setattr(memory, "_available", lambda: ample.peak_bytes - BASE)
    assert planner(None) == ample
    monkeypatch.setattr(memory, "_available", lambda: ample.peak_bytes - BASE - 1)
    assert planner(None).spill
    monkeypatch.setattr(memory, "_available", lambda: 0)  # no promise was asked for: go on
    assert planner(None).spill


@pytest.mark.parametrize("method", METHODS)
def test_the_less_memory_the_smaller_the_groups(method: str, tiny: Path) -> None:
    planner = Planner(tiny, method)
    least, ample = planner.least(), planner(None).peak_bytes
    sizes = {p.name: memory._statistics_bytes(p, planner.method) for p in planner.layers}
    blocks = [[layer for layer in planner.layers if layer.block == block] for block in range(2)]
    fixed = [
        memory._block_bytes(planner.model, index, own, planner.method, planner.length)
        for index, own in enumerate(blocks)
    ]
    every = [list(planner.model.linears(block)) for block in range(2)]
    counts = []
    for step in range(9):
        budget = least + (ample - 1 - least) * step // 8
        made = planner(budget)
        assert made.spill
        assert made.peak_bytes <= budget
        assert [[name for group in own for name in group] for own in made.groups] == every
        held = [sum(sizes[name] for name in group) for own in made.groups for group in own]
        assert BASE + max(fixed) + max(held) <= budget
        counts.append(len(made.groups[0]))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 1 or find_method(method).regional is not None


@pytest.mark.parametrize(("samples", "length"), [(1, 2000), (33, 63), (1500, 3)])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude+dsnot"])
def test_statistics_hold_no_more_than_is_counted(
    method: str, samples: int, length: int, tiny: Path
) -> None:
    planner = Planner(tiny, method)
    layer = planner.layers[0]
    width = layer.shape[1]
    statistics = InputStatistics(width, samples, torch.device("cpu"), planner.method.needs)
    for _ in range(samples):
        statistics.update(torch.ones(1, length, width))
    held = [value if isinstance(value, list) else [value] for value in vars(statistics).values()]
    size = sum(t.nbytes for row in held for t in row if isinstance(t, torch.Tensor))
    assert size <= memory._statistics_bytes(layer, planner.method) + 64 * width  # some vectors


def test_what_is_kept_is_counted(
    tiny: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A longer context, the inputs of more blocks or regions: more memory, as much as they take."""
    hidden = torch.empty(SAMPLES, LENGTH, 32).nbytes
    once, twice = Planner(tiny, "wanda"), Planner(tiny, "wanda", 2 * LENGTH)
    assert twice(None).peak_bytes - once(None).peak_bytes == hidden
    assert twice.least() == once.least()  # they would go to a file
    deep = make_model(tmp_path / "deep", num_hidden_layers=6)
    assert Planner(deep, "wanda")(None).peak_bytes == once(None).peak_bytes
    more = Planner(deep, "gblm")(None).peak_bytes - Planner(tiny, "gblm")(None).peak_bytes
    assert more == 4 * hidden
    by_length = [Planner(tiny, "wanda+blockwise", n)(None).peak_bytes for n in (LENGTH, 2 * LENGTH)]
    assert by_length[1] - by_length[0] >= 3 * hidden  # and a region's inputs and targets


@pytest.mark.parametrize("method", METHODS)
def test_too_little_is_refused_with_the_amount_that_is_enough(method: str, tiny: Path) -> None:
    planner = Planner(tiny, method)
    calibration = Calibration(data="pydoc", samples=SAMPLES, length=LENGTH)
    least = planner.least()
    with pytest.raises(UsageError, match="are too few") as refusal:
        plan(str(tiny), recipe(method, least - 1), calibration)
    named = re.search(r"need about (\d+\.\d\d) GiB", str(refusal.value))
    enough = re.search(r"--memory (\S+?GiB),", refusal.value.fix)
    assert named is not None
    assert enough is not None
    assert float(named[1]) * 2**30 == pytest.approx(least, abs=0.005 * 2**30)
    assert parse_size(enough[1]) >= least
    plan(str(tiny), recipe(method).model_copy(update={"memory": enough[1]}), calibration)
    assert plan(str(tiny), recipe(method, least), calibration).memory == planner(least)


def pruned(path: Path, out: Path, text: Path, prune: Prune) -> dict[str, Any]:
    """Everything that was made: names and bytes of the files, and the facts of the layers."""
    calibration = Calibration(data=str(text), samples=SAMPLES, length=LENGTH)
    result = prune_model(str(path), out, prune, calibration, quiet=True)
    differ = ("manifest.json", "timings.json")
    files = {file.name: file.read_bytes() for file in out.iterdir() if file.name not in differ}
    layers = {name: facts.model_dump() for name, facts in result.manifest.layers.items()}
    return {"files": files, "layers": layers, "notes": result.manifest.notes}


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("mixtral", method) for method in METHODS), ("gpt2", "gblm"), ("bloom", "wanda+blockwise")],
)
def test_the_least_memory_gives_the_same_bytes(
    family: str,
    method: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Statistics of one group at a time, states in a file; and the same files come out."""
    path = make_model(tmp_path / "model", family)
    observed: list[list[str]] = []
    alive: weakref.WeakSet[InputStatistics] = weakref.WeakSet()
    left_over: list[int] = []  # statistics of earlier groups, while the next are collected
    observe = Walk.observe

    def seen(walk: Walk, index: int, names: Collection[str]) -> Any:
        observed.append(list(names))
        left_over.append(len(alive))
        assert (tmp_path / "b.partial/states-pruned").exists() == bool(budget)
        found = observe(walk, index, names)
        alive.update(found.values())
        return found

    monkeypatch.setattr(Walk, "observe", seen)
    budget = 0
    unlimited = pruned(path, tmp_path / "a", text_file, recipe(method))
    assert len(observed) == 2
    observed.clear()
    planner = Planner(path, method)
    budget = planner.least()
    limited = pruned(path, tmp_path / "b", text_file, recipe(method, budget))
    groups = [group for own in planner(budget).groups for group in own]
    assert observed == groups
    assert len(groups) > 3 or planner.method.regional is not None
    assert limited["files"].keys() == unlimited["files"].keys()
    assert limited == unlimited
    assert not any(left_over)


@pytest.mark.parametrize("little", [False, True])
@pytest.mark.parametrize("at", ["load_outside", "first block", "second block"])
def test_taken_up_again_with_other_memory(
    at: str,
    little: bool,
    tiny: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed, with files of hidden states: the bytes are the same and nothing is left behind."""
    whole = pruned(tiny, tmp_path / "whole", text_file, recipe("gblm"))
    load, prune = StreamedModel.load_outside, Block.prune

    def load_until(model: StreamedModel, head: bool = False) -> None:
        if head and at == "load_outside":
            raise KeyboardInterrupt
        load(model, head)

    def prune_until(block: Any) -> None:
        if block.index == (at == "second block"):
            raise KeyboardInterrupt
        prune(block)

    monkeypatch.setattr(StreamedModel, "load_outside", load_until)
    monkeypatch.setattr(Block, "prune", prune_until)
    with pytest.raises(KeyboardInterrupt):
        pruned(tiny, tmp_path / "out", text_file, recipe("gblm"))
    monkeypatch.setattr(StreamedModel, "load_outside", load)
    monkeypatch.setattr(Block, "prune", prune)
    for name in ("walk", "slopes", "00000", "00001", "pruned"):
        (tmp_path / "out.partial" / f"states-{name}").write_bytes(bytes(99))
    budget = Planner(tiny, "gblm").least() if little else None
    again = pruned(tiny, tmp_path / "out", text_file, recipe("gblm", budget))
    assert again["files"].keys() == whole["files"].keys()
    assert again == whole


def test_a_model_that_must_not_be_whole_cannot_write_its_text(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """A budget for which the blocks are small enough, but all of them together are not."""
    path = make_model(tmp_path / "model", num_hidden_layers=24)
    whole = (
        BASE + memory.LIBRARIES + 4 * plan(str(path), recipe("wanda"), Calibration()).total_weights
    )
    budget = Planner(path, "wanda").least()
    assert budget < whole
    calibration = Calibration(samples=SAMPLES, length=LENGTH)
    with pytest.raises(UsageError, match="too little for --data self") as refusal:
        prune_model(str(path), tmp_path / "a", recipe("wanda", budget), calibration, quiet=True)
    assert "--data FILE" in refusal.value.fix
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="too little for --data self"):
        prune_model(str(path), tmp_path / "b", recipe("wanda", whole - 1), calibration, quiet=True)


def test_memory_does_not_grow_with_depth(make_model: Callable[..., Path], tmp_path: Path) -> None:
    peaks = []
    for layers in (3, 24):
        model = make_model(
            tmp_path / f"{layers}",
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
        )
        arguments = ["--method", "magnitude", "--pattern", "2:4", "--data", "none"]
        command = ["secateur", "prune", str(model), "-o", str(tmp_path / "out"), "--overwrite"]
        _, peak = run_process([sys.executable, "-m", *command, *arguments, "--quiet"])
        peaks.append(peak)
    weights = (model / "model.safetensors").stat().st_size
    assert weights > 140 * 2**20
    assert peaks[1] - peaks[0] < weights / 5
