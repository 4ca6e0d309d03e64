"""Zero-shot tasks by lm-eval, on models that are open already; items from files or lm-eval's own.

A task is a name of lm-eval's, whose items come from the hub, or a ``.jsonl`` file of

    {"goal", "sol1", "sol2", "label"}   PIQA, asked as lm-eval asks it; labels may also stand in
                                        NAME-labels.lst, as PIQA is distributed
    {"question", "choices", "answer"}   multiple choice; the answer is an index, a letter or a text
    {"text"}                            cloze: the last word is to be said, as LAMBADA asks

The score of a task is acc, the share of right answers; acc_norm takes the lengths of the choices
into account, where lm-eval computes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import EnvironmentFault, ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MULTIPLE = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}
_CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@dataclass(frozen=True, slots=True)
class Answers:
    """How one model did on one task, item by item in their order; norm where there is any."""

    acc: tuple[float, ...]
    norm: tuple[float, ...] | None


@dataclass(frozen=True)
class Task:
    """A task that can be asked.

    Attributes:
        name: lm-eval's, or the file's without its ending.
        sha256: of the items of a file as sorted JSON; None of lm-eval's own.
        made: lm-eval's object.
    """

    name: str
    sha256: str | None
    made: Any


def open_tasks(names: Sequence[str]) -> list[Task]:
    """Read files, and get lm-eval's own tasks; of a group or tag its members.

    Raises:
        EnvironmentFault: lm-eval is not installed, or the hub cannot be reached.
        ModelError: a file is missing or its lines are of no known form, or there is no such task.
        UsageError: two tasks have the same name.
    """
    _require()
    tasks: list[Task] = []
    for name in names:
        path = Path(name)
        if path.suffix == ".jsonl":
            items, form = read_items(path)
            tasks.append(Task(path.stem, _sha256(items), _local(path.stem, items, form)))
        else:
            tasks += [Task(member, None, made) for member, made in _stock(name).items()]
    known = [task.name for task in tasks]
    if len(set(known)) < len(known):
        raise UsageError(
            f"two tasks have the same name: {', '.join(sorted(known))}", "rename one of the files"
        )
    return tasks


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    quiet: bool = True,
) -> dict[str, Answers]:
    """Let lm-eval ask a model, without examples unless the task itself has some.

    Args:
        model: on its device.
        tokenizer: its own.
        tasks: from `open_tasks`.
        limit: ask only the first so many items of each.
        quiet: without lm-eval's progress bars.

    Returns:
        The answers by task.

    Raises:
        ModelError: a task has no score that is a mean over items.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    # One at a time nothing is padded, and so nothing rounds otherwise.
    batch = 1 if model.device.type == "cpu" else 16
    judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device))
    made = {task.name: task.made for task in tasks}
    for task in made.values():
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=0)
    with redirect_stderr(StringIO()) if quiet else nullcontext():
        found = evaluate(
            lm=judged,
            task_dict={"tasks": made, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
        )
    return {name: _answers(name, samples) for name, samples in found["samples"].items()}


def read_items(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The items of a file, brought into one form, and what lm-eval must know of that form.

    Raises:
        ModelError: the file is missing or its lines are of no known form.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        labels = path.with_name(f"{path.stem}-labels.lst")
        if rows and "sol1" in rows[0] and "label" not in rows[0]:
            given = labels.read_text(encoding="utf-8").split()
            rows = [{**row, "label": int(one)} for row, one in zip(rows, given, strict=True)]
        if rows and set(rows[0]) == {"text"}:
            return [{"text": row["text"].strip()} for row in rows], _CLOZE
        items = [_item(row) for row in rows]
    except OSError as fault:
        raise ModelError(
            f"the task file {fault.filename} cannot be read: {fault.strerror}", "check the path"
        ) from fault
    except (ValueError, LookupError, TypeError) as fault:
        raise ModelError(
            f"{path} is no task: {type(fault).__name__}: {fault}",
            "its lines must be PIQA's, or hold question, choices and answer, or text alone",
        ) from fault
    if not items:
        raise ModelError(f"{path} holds no item", "give another file")
    return items, _MULTIPLE


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """One item of a multiple choice."""
    if "sol1" in row:
        asked, choices = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]
        answer: Any = row["label"]
    else:
        asked, choices, answer = row["question"], list(row["choices"]), row["answer"]
    if isinstance(answer, str):
        letter = ord(answer) - ord("A") if len(answer) == 1 else -1
        answer = choices.index(answer) if answer in choices else letter
    if not 0 <= answer < len(choices):
        raise ValueError(f"the answer {row} is none of the choices")
    return {"query": asked, "choices": choices, "gold": int(answer)}


def _local(name: str, items: list[dict[str, Any]], form: dict[str, Any]) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **form,
    }
    return ConfigurableTask(config=config)


def _stock(name: str) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.task_index:
        raise ModelError(
            f"lm-eval has no task {name!r}", "see `lm_eval ls tasks`, or give a .jsonl file"
        )
    try:
        members: dict[str, Any] = manager.load(name)["tasks"]
    except (OSError, ValueError, RuntimeError) as fault:  # whatever datasets raises without a hub
        raise EnvironmentFault(
            f"the items of {name!r} cannot be had: {str(fault).strip().splitlines()[0]}",
            "check the network, or give the items as a .jsonl file",
        ) from fault
    return members


def _answers(name: str, samples: Sequence[dict[str, Any]]) -> Answers:
    first = samples[0]["filter"]
    rows = sorted((s for s in samples if s["filter"] == first), key=lambda row: row["doc_id"])
    metric = next((key for key in ("acc", "exact_match") if key in rows[0]), None)
    if metric is None:
        raise ModelError(
            f"the task {name!r} has no accuracy, only {', '.join(rows[0]['metrics'])}",
            "choose a task that is scored by acc or exact_match",
        )
    norm = tuple(float(row["acc_norm"]) for row in rows) if "acc_norm" in rows[0] else None
    return Answers(tuple(float(row[metric]) for row in rows), norm)


def _require() -> None:
    try:
        import lm_eval
    except ImportError as fault:
        raise EnvironmentFault(
            f"tasks are asked by lm-eval, which cannot be imported: {fault}",
            "pip install 'secateur[eval]'",
        ) from fault
    logging.getLogger(lm_eval.__name__).setLevel(logging.ERROR)


def _sha256(items: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()
