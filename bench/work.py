"""The directory in which a long measurement keeps what is finished, to go on after a break.

Each piece is a JSON file with the identity of its measurement: model (SHA-256), texts, settings,
processor, versions. A repeated run takes what has the same one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from secateur import recipe
from secateur.bench.processes import run_process
from secateur.bench.results import Environment
from secateur.calibration import read_text
from secateur.checkpoint import Checkpoint, file_sha256, write_json
from secateur.device import choose_device
from secateur.errors import UsageError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Work:
    """What all pieces of a measurement have in common, and where they are kept.

    Attributes:
        path: the directory.
        model: a model directory.
        calibration, evaluation: the texts.
        device: of pruning and of the evaluation.
        settings: what else decides the numbers.
        say: called with a line for what takes long.
    """

    path: Path
    model: Path
    calibration: recipe.Calibration
    evaluation: recipe.Accuracy
    device: str
    settings: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda _: None

    @cached_property
    def environment(self) -> Environment:
        """This machine."""
        return Environment.read(choose_device(self.device))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers of every piece; what is missing is found out here."""
        calibration, evaluation = self.calibration, self.evaluation
        machine = self.environment
        return {
            "model": Checkpoint(self.model).sha256(),
            "calibration": calibration.model_dump(mode="json")
            | {"sha256": _text_sha256(calibration.data)},
            "evaluation": evaluation.model_dump(mode="json")
            | {"sha256": _text_sha256(evaluation.data)},
            **self.settings,
            "machine": [machine.cpu, machine.cores, machine.device],
            "versions": machine.versions,
        }

    @cached_property
    def text(self) -> str:
        """What pruning is told to calibrate on; what the model writes itself is written once."""
        calibration = self.calibration
        if calibration.data != "self":
            return calibration.data
        key = json.dumps([self.identity["model"], calibration.model_dump()], sort_keys=True)
        file = self.path / f"self-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if not file.exists():
            self.say("calibration text, written by the model")
            script = (
                "import sys; from secateur.bench.calibrated_work import write_own_text; "
                "write_own_text(*sys.argv[1:])"
            )
            how = [str(self.model), calibration.model_dump_json(), self.device, str(file)]
            run_process([sys.executable, "-c", script, *how])
        return str(file)

    def make(self) -> None:
        """Make the directory."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UsageError(
                f"the work directory {self.path} cannot be made: {fault.strerror}",
                "give another --work",
            ) from fault

    def calibrated(self) -> list[str]:
        """The flags of ``secateur prune`` that name the calibration and the device."""
        text = self.calibration
        named = ["--data", self.text, "--samples", str(text.samples), "--length", str(text.length)]
        return [*named, "--seed", str(text.seed), "--device", self.device]

    def read(self, name: str, kind: type[Item], **more: str) -> Item | None:
        """What is finished under this name and identity; None: nothing is."""
        identity = self.identity | more
        try:
            kept = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
            if kept["identity"] != identity:
                return None
            return TypeAdapter(kind).validate_python(kept["result"])
        except (OSError, ValueError, LookupError, TypeError):
            return None  # damaged, or of another version: measured again

    def write(self, name: str, result: Any, **more: str) -> None:
        """Keep a result."""
        kept = {"identity": self.identity | more, "result": result}
        write_json(self.path / f"{name}.json", kept)


def _text_sha256(data: str) -> str | None:
    """The hash of a text; None for one that the model writes, or for none."""
    if data in ("self", "none"):
        return None
    if Path(data).is_file():
        return file_sha256(Path(data))
    return hashlib.sha256(read_text(data).encode()).hexdigest()
