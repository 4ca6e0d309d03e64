"""The models that several results speak of, joined by their paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal

from secateur.artifact import Manifest
from secateur.bench.latency_results import LatencyResult, ModelLatency, PointLatency
from secateur.bench.report.inputs import Source
from secateur.bench.results import AccuracyResult, Estimate, ModelAccuracy, Spread
from secateur.bench.rivals import RivalRow, RivalsResult

Group = Literal["sparse", "dense", "rival"]
OURS = ("native", "transformers")


@dataclass(frozen=True)
class Subject:
    """A model on an engine, with what is known of it.

    Attributes:
        name: the end of its path, as long as it takes to tell it from the others, and the engine if
            it is another program's.
        group: "rival" if another program ran it; else "sparse" or "dense" by its linears.
        engine: None if its speed was not measured.
        bytes: of its weight files.
        quality, baseline: its accuracy, and that of the model that it was compared with.
        prefill, decode: tokens per second, with the first prompt length and batch measured.
        prefill_speedup, decode_speedup: over the baseline of the same run.
    """

    path: str
    name: str
    group: Group
    engine: str | None
    bytes: int
    quality: ModelAccuracy | None
    baseline: ModelAccuracy | None
    prefill: Spread | None = None
    decode: Spread | None = None
    prefill_speedup: Estimate | None = None
    decode_speedup: Estimate | None = None

    def worse_than(self, other: Subject) -> bool:
        """Whether another one has a lower perplexity, decodes as fast and is as small."""
        mine, its = _merits(self), _merits(other)
        if mine is None or its is None or self is other:
            return False
        return all(a <= b for a, b in zip(mine, its, strict=True)) and mine != its


def find_subjects(sources: Sequence[Source]) -> list[Subject]:
    """Every model of the accuracy, latency and rivals results; the last result of one counts."""
    results = [source.result for source in sources]
    qualities: dict[str, tuple[ModelAccuracy, ModelAccuracy | None]] = {}
    for result in results:
        if isinstance(result, AccuracyResult):
            qualities |= {model.path: (model, result.baseline) for model in result.everyone}
    found: dict[tuple[str, str | None], Subject] = {}
    for result in results:
        if isinstance(result, LatencyResult):
            made = [_of_latency(model, qualities) for model in result.everyone]
        elif isinstance(result, RivalsResult):
            made = _of_rivals(result, qualities, sources)
        else:
            continue
        found |= {(subject.path, subject.engine): subject for subject in made}
    timed = {path for path, _ in found}
    for path, (quality, baseline) in qualities.items():
        if path not in timed:
            group = _group_of_files(path, sources, baseline is not None and quality is not baseline)
            subject = Subject(path, path, group, None, quality.bytes, quality, baseline)
            found[path, None] = subject
    return _named(list(found.values()))


def front(subjects: Iterable[Subject]) -> list[Subject]:
    """Those with quality and speed that no other one beats; see `Subject.worse_than`."""
    known = [subject for subject in subjects if _merits(subject) is not None]
    return [one for one in known if not any(one.worse_than(other) for other in known)]


def _merits(subject: Subject) -> tuple[float, float, float] | None:
    """Greater is better."""
    if subject.quality is None or subject.decode is None:
        return None
    return -subject.quality.perplexity.value, subject.decode.mean, -float(subject.bytes)


def _of_latency(
    model: ModelLatency, qualities: dict[str, tuple[ModelAccuracy, ModelAccuracy | None]]
) -> Subject:
    layouts = model.modules if model.engine == "native" else ()
    sparse = "SparseLinear" in model.modules or any(
        not layout.startswith("dense") for layout in layouts
    )
    group: Group = "sparse" if sparse else "dense"
    quality, baseline = qualities.get(model.path, (None, None))
    path, engine = model.path, model.engine
    return _timed(path, engine, model.bytes, group, quality, baseline, model.points[0])


def _of_rivals(
    result: RivalsResult,
    qualities: dict[str, tuple[ModelAccuracy, ModelAccuracy | None]],
    sources: Sequence[Source],
) -> list[Subject]:
    made = []
    for index, row in enumerate(result.rows):
        if row.absent is not None or row.bytes is None:
            continue
        quality, baseline = qualities.get(row.path, (None, None))
        group = _group_of_files(row.path, sources, index > 0)
        made.append(_timed(row.path, row.engine, row.bytes, group, quality, baseline, row))
    return made


def _timed(
    path: str,
    engine: str,
    size: int,
    group: Group,
    quality: ModelAccuracy | None,
    baseline: ModelAccuracy | None,
    measured: PointLatency | RivalRow,
) -> Subject:
    """A model whose speed was measured; another program's is a rival, whatever its linears are."""
    return Subject(
        path=path,
        name=path,
        group=group if engine in OURS else "rival",
        engine=engine,
        bytes=size,
        quality=quality,
        baseline=baseline,
        prefill=measured.prefill_tokens_per_s,
        decode=measured.decode_tokens_per_s,
        prefill_speedup=measured.prefill_speedup,
        decode_speedup=measured.decode_speedup,
    )


def _group_of_files(path: str, sources: Sequence[Source], compared: bool) -> Group:
    """From the manifest, if it is there; a model that is compared with another one is sparse."""
    if PurePath(path).suffix in (".gguf", ".onnx"):
        return "rival"
    own = f"{PurePath(path).name}.manifest.json"
    for source in sources:
        if isinstance(source.result, Manifest) and source.name == own:
            pruned = any(layer.sparsity > 0 for layer in source.result.layers.values())
            return "sparse" if pruned else "dense"
    return "sparse" if compared else "dense"


def _named(subjects: list[Subject]) -> list[Subject]:
    """Short names, all of them different."""
    paths = {subject.path for subject in subjects}
    named = []
    for subject in subjects:
        parts = PurePath(subject.path).parts
        for length in range(1, len(parts) + 1):
            name = "/".join(parts[-length:])
            ends = [path for path in paths if PurePath(path).parts[-length:] == parts[-length:]]
            if len(ends) == 1:
                break
        if subject.engine is not None and subject.engine not in OURS:
            name = name if subject.path.endswith(".gguf") else f"{name} ({subject.engine})"
        named.append(replace(subject, name=name))
    return named
