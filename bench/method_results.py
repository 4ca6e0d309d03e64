"""What `bench methods` is asked for, and what it finds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from secateur import recipe
from secateur.bench.results import ModelAccuracy, TextFacts, _Facts, _Result
from secateur.errors import UsageError

Compat = Literal["exact", "reference"]

_ENTRY = re.compile(
    r"(?P<chain>[^:\[\]]+)(?::(?P<allocate>[^:\[\]]+))?(?:\[(?P<settings>[^\[\]]+)\])?"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands in one row of the table: ``CHAIN[:ALLOCATION]['['STEP.KEY=VALUE,…']']``."""

    text: str
    chain: str
    allocate: str | None = None
    settings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an entry.

        Raises:
            UsageError: it is not of the form above. Whether the words are known is not asked.
        """
        text = text.strip()
        form = _ENTRY.fullmatch(text)
        listed = form["settings"] if form else None
        settings = tuple(map(str.strip, listed.split(","))) if listed else ()
        if form is None or not all("=" in setting for setting in settings):
            raise UsageError(
                f"the method {text!r} is not understood",
                "write a chain, then :ALLOCATION and [STEP.KEY=VALUE,…] where wanted: wanda+lsq, "
                "alps:owl, sparsegpt[sparsegpt.percdamp=0.05]",
            )
        return cls(text, form["chain"], form["allocate"], settings)

    def arguments(self) -> list[str]:
        """The flags of ``secateur prune`` that say the same."""
        allocate = ["--allocate", self.allocate] if self.allocate else []
        settings = [word for setting in self.settings for word in ("--set", setting)]
        return ["--method", self.chain, *allocate, *settings]


def split_entries(text: str) -> list[str]:
    """The parts between commas, those inside brackets excepted."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)]


class MethodRow(_Facts):
    """One pattern pruned by one method; everything else is None if the cell failed.

    Attributes:
        pattern, method: as they were asked for.
        error: why there is nothing; None if there is.
        accuracy: of the pruned model, against the dense one.
        sparsity: zeros among the weights of all linear layers in the blocks.
        error_mean, error_worst: of the layers' ‖(W - Ŵ)X‖² / ‖WX‖² on the calibration inputs.
        worst_layer: the layer that has the worst.
        seconds: of pruning, without the making of calibration text.
        relative_seconds: to the median of `MethodsResult.dense_passes_seconds`.
        peak_rss_bytes: of the process that pruned, its calibration text included.
        notes: what the manifest remarks, e.g. layers left dense.
    """

    pattern: str
    method: str
    error: str | None = None
    accuracy: ModelAccuracy | None = None
    sparsity: float | None = None
    error_mean: float | None = None
    error_worst: float | None = None
    worst_layer: str | None = None
    seconds: float | None = None
    relative_seconds: float | None = None
    peak_rss_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """To sort by: infinite where the cell failed."""
        return self.accuracy.perplexity.value if self.accuracy else float("inf")


class MethodsResult(_Result):
    """The result of ``bench methods``; docs/bench.md explains every key.

    Attributes:
        model: as it was named.
        model_sha256: of its config and weight files.
        dense: how the unpruned model reads the same text.
        dense_passes_seconds: repeated timings of the work that no calibrated method can avoid.
        rows: by pattern as they were asked for, then by perplexity; failed cells last.
    """

    schema_: Literal["secateur/bench-methods/1"] = Field("secateur/bench-methods/1", alias="schema")
    model: str
    model_sha256: dict[str, str]
    calibration: recipe.Calibration
    compat: Compat
    text: TextFacts
    window: int
    stride: int
    windows: int
    predicted_tokens: int
    dense: ModelAccuracy
    dense_passes_seconds: tuple[float, ...]
    rows: tuple[MethodRow, ...]

    @property
    def failed(self) -> tuple[MethodRow, ...]:
        """The rows without numbers."""
        return tuple(row for row in self.rows if row.error is not None)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what ``--output`` wrote.

        Raises:
            UsageError: the file is missing or is no such result.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as fault:
            raise UsageError(
                f"the result {path} cannot be read: {fault.strerror}", "check the path"
            ) from fault
        except ValidationError as fault:
            first = fault.errors()[0]
            raise UsageError(
                f"{path} is no result of bench methods: "
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                "name a file that `secateur bench methods -o FILE` wrote",
            ) from fault
