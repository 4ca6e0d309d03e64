"""Output directories: made aside, resumable, and never half there; each with a manifest.

While it grows, ``DIR`` is ``DIR.partial``; `Artifact.commit` hashes every file, writes
``manifest.json`` and renames. A second run of the same work finds ``DIR.partial`` and goes on.
``manifest.json`` holds facts that are equal in every run of the same work; what differs
(clock times, durations) is in ``timings.json`` beside it, which the manifest does not hash.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import secateur
from secateur.checkpoint import file_sha256, sync_file, write_json
from secateur.errors import ModelError, UsageError

MANIFEST = "manifest.json"
TIMINGS = "timings.json"
_IDENTITY = "identity.json"
_LOCK = ".lock"
_PRIVATE = {_IDENTITY, _LOCK, MANIFEST, TIMINGS}


class LayerFacts(BaseModel):
    """What became of one linear layer.

    Attributes:
        pattern: the pattern that its mask has.
        kept_dense: why it was left dense; None if it was not.
        sparsity: fraction of its weights that the mask removes.
        relative_error: ‖(W - Ŵ)X‖² / ‖WX‖² on calibration inputs X; None if not measured.
        dense_bytes, bytes: its size in dense form of the same value type, and as stored.
        steps: the methods applied, with their counts of anything unusual.
        transposed: whether the weight is stored as ``[in, out]`` (GPT-2); shape, mask and pattern
            speak of ``[out, in]`` all the same.
    """

    model_config = ConfigDict(extra="forbid")

    shape: tuple[int, int]
    pattern: str
    kept_dense: str | None = None
    sparsity: float = 0.0
    relative_error: float | None = None
    dense_bytes: int
    bytes: int
    steps: dict[str, Any] = Field(default_factory=dict)
    transposed: bool = False


class FileFacts(BaseModel):
    """Size and hash of one file of the artifact."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """``manifest.json``: what is in a directory and how it came to be."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: Literal["secateur/manifest/1"] = Field("secateur/manifest/1", alias="schema")
    kind: Literal["pruned", "narrowed", "packed", "dense", "exported"]
    secateur: str = secateur.__version__
    versions: dict[str, str] = Field(default_factory=dict)
    source: dict[str, Any]
    recipe: dict[str, Any]
    seed: int | None = None
    layers: dict[str, LayerFacts]
    notes: list[str] = Field(default_factory=list)
    files: dict[str, FileFacts] = Field(default_factory=dict)

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Read the manifest of an artifact.

        Raises:
            ModelError: there is none, or it is not one that this version understands.
        """
        path = Path(directory) / MANIFEST
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{directory} has no {MANIFEST}: it was not written by secateur",
                "make it with `secateur prune` or `secateur compile`",
            ) from None
        except ValidationError as fault:
            first = fault.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ModelError(
                f"{path} is not a valid manifest: {place}: {first['msg']}",
                "write the directory again with this version of secateur",
            ) from fault


def library_versions(*names: str) -> dict[str, str]:
    """The installed versions of the named distributions."""
    from importlib.metadata import version

    return {name: version(name) for name in names}


class Artifact:
    """An output directory under construction; use it as a context manager.

    Leaving the context without `commit` keeps ``DIR.partial`` for a later run to resume, unless a
    fault came before anything was in it.

    Args:
        output: the final directory.
        identity: everything that decides the content; a partial directory with another identity
            is refused, not mixed with.
        overwrite: replace an existing output (and discard a partial one of another identity).

    Raises:
        UsageError: the output exists, or a partial output belongs to other work.
    """

    def __init__(self, output: str | Path, identity: dict[str, Any], overwrite: bool) -> None:
        self.output = Path(output)
        self.path = self.output.with_name(self.output.name + ".partial")
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.overwrite = overwrite
        self.resumed = False
        self._lock: IO[str] | None = None

    def __enter__(self) -> Artifact:
        refuse_existing(self.output, self.overwrite)
        self._settle_identity()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UsageError(
                f"{self.path} is being written by another process",
                "wait for that process, or give another output directory",
            ) from None
        if not self.resumed:
            write_json(self.path / _IDENTITY, self.identity)
        return self

    def _settle_identity(self) -> None:
        if not self.path.exists():
            return
        try:
            found = json.loads((self.path / _IDENTITY).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            found = None  # killed before the first line was written: nothing worth keeping
        if found == self.identity:
            self.resumed = True
        elif found is None or self.overwrite:
            shutil.rmtree(self.path)
        else:
            differ = "; ".join(differences(found, self.identity))
            raise UsageError(
                f"{self.path} holds unfinished work of another recipe: {differ}",
                "run the earlier recipe again to finish it, or pass --overwrite to discard it",
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is None:
            return
        if kind is not None and {file.name for file in self.path.glob("*")} <= _PRIVATE:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def commit(self, manifest: Manifest, timings: dict[str, Any]) -> Manifest:
        """Hash all files, write the manifest, and give the directory its final name."""
        for private in _PRIVATE:
            (self.path / private).unlink(missing_ok=True)
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        facts = {}
        for file in files:
            name = file.relative_to(self.path).as_posix()
            facts[name] = FileFacts(bytes=file.stat().st_size, sha256=file_sha256(file))
            sync_file(file)
        manifest = manifest.model_copy(update={"files": facts})
        write_json(self.path / TIMINGS, timings)
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
        sync_file(self.path)
        replaced = self.output.with_name(self.output.name + ".replaced")
        if self.output.exists():
            os.replace(self.output, replaced)
        os.replace(self.path, self.output)
        shutil.rmtree(replaced, ignore_errors=True)
        sync_file(self.output.absolute().parent)
        return manifest


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise UsageError if ``output`` is there and may not be replaced."""
    occupied = output.is_file() or (output.is_dir() and any(output.iterdir()))
    if not occupied:
        return
    if output.is_file() or not overwrite:
        raise UsageError(
            f"the output {output} already exists",
            "give another -o, or pass --overwrite to replace it",
        )
    if not (output / MANIFEST).exists():
        raise UsageError(
            f"the output {output} exists and was not written by secateur",
            "give another -o; --overwrite replaces secateur's own directories only",
        )


def differences(old: dict[str, Any], new: dict[str, Any], at: str = "") -> list[str]:
    """The keys whose values differ, with both values."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{at}{key}.")
        elif a != b:
            found.append(f"{at}{key} was {a!r}, now {b!r}")
    return found
