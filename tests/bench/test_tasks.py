"""Tasks: our way to lm-eval beside its own, and a plain loop; what is recovered of dense."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.bench.accuracy import measure_accuracy
from secateur.bench.recovery import check_gates, parse_share, recovery, require_grounds
from secateur.bench.results import AccuracyResult
from secateur.bench.tasks import ask, open_tasks, read_items
from secateur.errors import EnvironmentFault, ModelError, UsageError
from secateur.model import load_causal_lm, load_tokenizer
from secateur.recipe import Accuracy

ITEMS = 24


@pytest.fixture(scope="module")
def long_tiny(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tasks") / "dense", max_position_embeddings=512)


@pytest.fixture(scope="module")
def other_tiny(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model(tmp_path_factory.mktemp("tasks") / "other", max_position_embeddings=512)
    model = load_causal_lm(path)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[:, ::2] = 0
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def piqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items as PIQA is distributed: the labels in a file of their own."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("piqa") / "piqa-valid.jsonl"

    def words(count: int) -> str:
        return " ".join(
            "".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(count)
        )

    rows = [
        {"goal": words(4), "sol1": words(draw.randint(1, 5)), "sol2": words(draw.randint(1, 5))}
        for _ in range(ITEMS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = "".join(f"{draw.randint(0, 1)}\n" for _ in rows)
    path.with_name("piqa-valid-labels.lst").write_text(labels)
    return path


def stock_piqa(file: Path) -> Any:
    """lm-eval's own PIQA, only that its items come from a file."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "piqa" / "piqa.yaml")
    where = {"data_files": {"validation": str(file)}}
    config |= {"dataset_path": "json", "dataset_kwargs": where, "training_split": None}
    return ConfigurableTask(config=config)


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    before = tokenizer(context)["input_ids"]
    after = tokenizer(continuation)["input_ids"]
    ids = torch.tensor([before + after])
    with torch.inference_mode():
        log_p = torch.log_softmax(model(ids).logits[0].double(), -1)
    return sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(after))


def test_piqa_equals_lm_eval_and_a_plain_loop(
    long_tiny: Path, piqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_causal_lm(long_tiny, dtype=torch.float32), load_tokenizer(long_tiny)
    (ours,) = ask(model, tokenizer, open_tasks([str(piqa)])).values()
    rows = [json.loads(line) for line in piqa.read_text().splitlines()]
    labels = [*map(int, piqa.with_name("piqa-valid-labels.lst").read_text().split())]

    labelled = tmp_path / "labelled.jsonl"
    pairs = zip(rows, labels, strict=True)
    labelled.write_text("".join(json.dumps({**row, "label": n}) + "\n" for row, n in pairs))
    task = stock_piqa(labelled)
    task.set_config(key="num_fewshot", value=0)
    theirs = evaluate(
        lm=HFLM(pretrained=str(long_tiny), dtype="float32", device="cpu", batch_size=1),
        task_dict={"tasks": {"piqa": task}, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
    )
    found = theirs["results"]["piqa"]
    assert np.mean(ours.acc) == found["acc,none"]
    assert ours.norm is not None
    assert np.mean(ours.norm) == found["acc_norm,none"]
    samples = sorted(theirs["samples"]["piqa"], key=lambda sample: sample["doc_id"])
    assert [sample["acc"] for sample in samples] == list(ours.acc)

    plain, normed = [], []
    for row, label in zip(rows, labels, strict=True):
        asked = f"Question: {row['goal']}\nAnswer:"
        choices = [row["sol1"], row["sol2"]]
        scores = [log_likelihood(model, tokenizer, asked, f" {one}") for one in choices]
        plain.append(float(np.argmax(scores) == label))
        per_letter = [score / len(one) for score, one in zip(scores, choices, strict=True)]
        normed.append(float(np.argmax(per_letter) == label))
    assert list(ours.acc) == plain
    assert list(ours.norm) == normed
    assert 0 < sum(plain) < ITEMS  # else the comparison says little
    limited = ask(model, tokenizer, open_tasks([str(piqa)]), limit=5)["piqa-valid"]
    assert limited.acc == ours.acc[:5]


def test_forms_of_items(tmp_path: Path) -> None:
    file = tmp_path / "quiz.jsonl"
    file.write_text(
        '{"question": "2+2?", "choices": ["3", "4"], "answer": 1}\n'
        '{"question": "a?", "choices": ["x", "y", "z"], "answer": "C"}\n'
        '{"question": "b?", "choices": ["A", "B"], "answer": "A"}\n'
    )
    items, form = read_items(file)
    assert [item["gold"] for item in items] == [1, 2, 0]
    assert items[0] == {"query": "2+2?", "choices": ["3", "4"], "gold": 1}
    assert form["output_type"] == "multiple_choice"
    (task,) = open_tasks([str(file)])
    assert task.name == "quiz"
    assert task.made.doc_to_text(items[1]) == "a?"
    assert task.made.doc_to_choice(items[1]) == ["x", "y", "z"]
    assert task.made.doc_to_target(items[1]) == 2

    cloze = tmp_path / "cloze.jsonl"
    cloze.write_text('{"text": "the quick brown fox "}\n')
    (task,) = open_tasks([str(cloze)])
    (item,) = task.made.test_docs()
    assert task.made.doc_to_text(item) == "the quick brown"
    assert task.made.doc_to_target(item) == " fox"
    with pytest.raises(UsageError, match="same name"):
        open_tasks([str(cloze), str(cloze)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no item"),
        ("{", "no task: JSONDecodeError"),
        ('{"a": 1}', "no task: KeyError"),
        ('{"question": "?", "choices": ["x"], "answer": 1}', "none of the choices"),
        ('{"question": "?", "choices": ["x"], "answer": "B"}', "none of the choices"),
        ('{"goal": "?", "sol1": "x", "sol2": "y"}', "cannot be read"),  # no labels anywhere
    ],
)
def test_files_that_are_no_tasks(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(ModelError, match=said):
        read_items(file)


def test_lm_eval_may_be_absent(piqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentFault, match="lm-eval") as fault:
        open_tasks([str(piqa)])
    assert "secateur[eval]" in fault.value.fix


bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=40)


@given(st.lists(bits, min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_recovery_is_the_ratio_of_means_over_tasks(made: list[list[tuple[bool, bool]]]) -> None:
    own = [[float(a) for a, _ in task] for task in made]
    dense = [[float(b) for _, b in task] for task in made]
    if not any(map(any, dense)):
        assert recovery(own, dense) is None
        return
    found = recovery(own, dense)
    assert found is not None
    means = [sum(sum(task) / len(task) for task in tasks) for tasks in (own, dense)]
    assert found.value == pytest.approx(means[0] / means[1])
    assert found.low <= found.high
    same = recovery(dense, dense)
    assert same is not None
    assert (same.value, same.low, same.high) == (1, 1, 1)


def test_the_interval_is_that_of_scipys_paired_bootstrap() -> None:
    draw = np.random.default_rng(1)
    dense = (draw.random(300) < 0.7).astype(float)
    own = np.where(draw.random(300) < 0.9, dense, 1 - dense)
    found = recovery([own.tolist()], [dense.tolist()])
    reference = scipy.stats.bootstrap(
        (own, dense),
        lambda x, y, axis=-1: x.mean(axis) / y.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert found.low == pytest.approx(reference.low, abs=0.005)
    assert found.high == pytest.approx(reference.high, abs=0.005)
    assert found.low < found.value < found.high
    # Unpaired, the interval would be wider: what is hard for one is hard for the other.
    shuffled = recovery([own.tolist()], [draw.permutation(dense).tolist()])
    assert found.high - found.low < 0.8 * (shuffled.high - shuffled.low)


@pytest.fixture(scope="module")
def measured(long_tiny: Path, other_tiny: Path, piqa: Path) -> AccuracyResult:
    quiz = piqa.with_name("quiz.jsonl")
    rows = [{"question": f"q{n}", "choices": ["a", "bb"], "answer": n % 2} for n in range(6)]
    quiz.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = piqa.with_name("text.txt")
    text.write_text("".join(random.Random(1).choices("abcdefgh .", k=201)))
    reading = Accuracy(data=str(text), window=32, windows=4, tasks=(str(piqa), str(quiz)))
    return measure_accuracy([other_tiny], reading, against=long_tiny)


def test_accuracy_of_two_models_on_two_tasks(measured: AccuracyResult) -> None:
    (model,), base = measured.models, measured.baseline
    assert base is not None
    assert [task.name for task in model.tasks] == ["piqa-valid", "quiz"]
    assert [task.items for task in model.tasks] == [ITEMS, 6]
    assert [task.recovery for task in base.tasks] == [None, None]
    for own, dense in zip(model.tasks, base.tasks, strict=True):
        assert own.sha256 == dense.sha256
        assert own.acc.value == pytest.approx(np.mean(own.right))
        error = np.std(own.right, ddof=1) / np.sqrt(own.items)
        assert own.acc.standard_error == pytest.approx(error)
        assert own.recovery == recovery([own.right], [dense.right])
    assert model.recovery == recovery(
        [task.right for task in model.tasks], [task.right for task in base.tasks]
    )
    assert base.recovery is None
    assert AccuracyResult.model_validate(json.loads(json.dumps(measured.to_json()))) == measured


def test_gates_are_decided_by_the_value(measured: AccuracyResult) -> None:
    (model,) = measured.models
    assert model.recovery is not None
    assert model.perplexity_ratio is not None
    kept, grown = model.recovery.value, model.perplexity_ratio.value - 1
    for least, most, expected in (
        (kept, grown, [True, True]),
        (np.nextafter(kept, 9), grown - 1e-9, [False, False]),
        (kept, None, [True]),
        (None, None, []),
    ):
        gates = check_gates(measured, least, most).gates
        assert [gate.passed for gate in gates] == expected
    far = check_gates(measured, model.recovery.high + 1, grown + 1e9).gates
    assert [gate.certain for gate in far] == [True, True]
    hopeless = model.model_copy(update={"recovery": None})
    with pytest.raises(ModelError, match="no right answer"):
        check_gates(measured.model_copy(update={"models": (hopeless,)}), 0.5, None)
    near = check_gates(measured, kept, grown).gates
    assert [gate.certain for gate in near] == [False, False]


def test_limits_need_grounds() -> None:
    assert (parse_share("10%"), parse_share("0.1")) == (pytest.approx(0.1), 0.1)
    for text in ("ten", "-1%", "nan"):
        with pytest.raises(UsageError, match="no share"):
            parse_share(text)
    require_grounds(None, None, None, None)
    require_grounds("dense", None, None, 0.1)
    with pytest.raises(UsageError, match="--against"):
        require_grounds(None, ("t",), 0.99, None)
    with pytest.raises(UsageError, match="--task"):
        require_grounds("dense", None, 0.99, None)


def test_a_failed_gate_ends_with_code_5(
    long_tiny: Path,
    other_tiny: Path,
    piqa: Path,
    tmp_path: Path,
    secateur_command: Callable[..., Any],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc def gh " * 20)
    command = [
        "bench", "accuracy", other_tiny, "--against", long_tiny, "--data", text, "--window", 32,
        "--windows", 2, "--task", piqa, "--limit", 8, "--quiet",
    ]  # fmt: skip
    out = tmp_path / "out.json"
    ended = secateur_command(*command, "--min-recovery", 99, "--json", "--output", out)
    assert ended.returncode == 5
    printed = json.loads(ended.stdout)
    error = printed.pop("error")
    assert error["exit_code"] == 5
    assert "recovery" in error["message"]
    assert "at least 99 was asked" in error["message"]
    assert printed == json.loads(out.read_text())
    assert [gate["passed"] for gate in printed["gates"]] == [False]
    ended = secateur_command(*command, "--min-recovery", 0, "--max-ppl-increase", "0%")
    grew = AccuracyResult.model_validate(printed).models[0].perplexity_ratio
    assert grew is not None
    assert ended.returncode == (5 if grew.value > 1 else 0)
    assert "recovery" in ended.stdout
    assert f"gate: {other_tiny}: perplexity_increase {grew.value - 1:.4f}" in ended.stdout
