"""What a report is made from: files of ``secateur bench … -o``, and manifests of models."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from secateur.artifact import MANIFEST, Manifest
from secateur.bench.latency_results import LatencyResult
from secateur.bench.method_results import MethodsResult
from secateur.bench.results import AccuracyResult
from secateur.bench.rivals import RivalsResult
from secateur.bench.serving_results import ServingResult
from secateur.checkpoint import write_json
from secateur.errors import ModelError, UsageError

_TYPES: tuple[type[BaseModel], ...] = (
    AccuracyResult,
    LatencyResult,
    ServingResult,
    RivalsResult,
    MethodsResult,
    Manifest,
)
KINDS = {kind.model_fields["schema_"].default: kind for kind in _TYPES}
DATA = "secateur-data"
"""Id of the element of a report that holds the data."""

_ELEMENT = re.compile(rf'<script type="application/json" id="{DATA}">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One file that was read.

    Attributes:
        name: unique among the sources of a report; a file name.
        content: as it was read.
        result: one of `KINDS`.
    """

    name: str
    content: dict[str, Any]
    result: Any


def read_sources(paths: Sequence[str | Path]) -> list[Source]:
    """Read results; of a model directory its manifest, of a report all that is inside it.

    Raises:
        ModelError: a file is absent or no JSON.
        UsageError: it is of a kind that has no place in a report, or of another version.
    """
    found: list[Source] = []
    for path in map(Path, paths):
        if path.suffix == ".html":
            parts = embedded(path)
        elif path.is_dir():
            parts = [(f"{path.resolve().name}.manifest.json", _read_json(path / MANIFEST))]
        else:
            parts = [(path.name, _read_json(path))]
        for name, content in parts:
            unique = _unique(name, {source.name for source in found})
            found.append(Source(unique, content, _parse(str(path), content)))
    return found


def embedded(report: Path) -> list[tuple[str, dict[str, Any]]]:
    """The names and contents that are inside a report.

    Raises:
        ModelError: it cannot be read, or holds none.
    """
    match = _ELEMENT.search(_read_text(report))
    try:
        data: Any = json.loads(match[1]) if match else None
        return [(part["name"], part["content"]) for part in data["sources"]]
    except (ValueError, TypeError, KeyError) as fault:
        raise ModelError(
            f"{report} is no report with data inside", "name a file that `secateur report` wrote"
        ) from fault


def embed(sources: Sequence[Source]) -> str:
    """The element that `embedded` reads."""
    parts = [{"name": source.name, "content": source.content} for source in sources]
    text = json.dumps({"version": 1, "sources": parts}, separators=(",", ":"))
    text = text.replace("</", "<\\/")  # which would end the element
    return f'<script type="application/json" id="{DATA}">{text}</script>'


def extract(report: str | Path, directory: str | Path) -> list[Path]:
    """Write the data inside a report into files of a directory, which is made.

    Raises:
        ModelError: the report cannot be read, or holds no data.
        UsageError: a file is there already.
    """
    written = []
    for name, content in embedded(Path(report)):
        file = Path(directory) / Path(name).name
        if file.exists():
            raise UsageError(f"{file} is there already", "choose another directory")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
        written.append(file)
    return written


def _parse(path: str, content: dict[str, Any]) -> Any:
    schema = content.get("schema")
    if schema not in KINDS:
        raise UsageError(
            f"{path} has schema {schema!r}, of which a report cannot tell",
            "name files that `secateur bench accuracy|latency|serving|rivals|methods -o FILE` of "
            "this version wrote, or model directories",
        )
    try:
        return KINDS[schema].model_validate(content)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path} is not as its schema says: {where}: {first['msg']}", "measure it again"
        ) from fault


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ModelError(f"{path} cannot be read: {fault}", "check the path") from fault


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        content = json.loads(text)
    except ValueError as fault:
        raise ModelError(f"{path} is no JSON: {fault}", "name a result file") from fault
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object", "name a result file")
    return content


def _unique(name: str, taken: set[str]) -> str:
    stem, dot, end = name.rpartition(".")
    names = (name, *(f"{stem or end}-{i}{dot}{end}" for i in range(2, len(taken) + 3)))
    return next(one for one in names if one not in taken)
