"""The models under measurement: opening them alike, and the facts that need no forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.artifact import Manifest
from secateur.bench.results import Environment
from secateur.checkpoint import Checkpoint
from secateur.errors import ModelError, UsageError
from secateur.model import load_causal_lm
from secateur.source import resolve_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def directory_of(model: str | Path) -> Path:
    """A model's directory; of a GGUF file the one that it was dequantised into.

    Raises:
        ModelError: there is no such GGUF file, or transformers cannot read it.
    """
    return resolve_model(str(model)) if Path(model).suffix == ".gguf" else Path(model)


def model_bytes(model: str | Path) -> int:
    """The bytes of the weight files (the ``*.safetensors`` that are read, or the GGUF file).

    Raises:
        ModelError: the directory or one of its files is missing or damaged.
    """
    if Path(model).suffix == ".gguf":
        return Path(model).stat().st_size
    return sum(file.stat().st_size for file in Checkpoint(model).files)


def check_models(paths: Sequence[str | Path], positions: int) -> None:
    """Refuse, before anything slow, what cannot be measured.

    Args:
        paths: model directories.
        positions: tokens that each must be able to read at once.

    Raises:
        UsageError: there are no models.
        ModelError: a directory is missing or damaged, or its model reads fewer positions.
    """
    if not paths:
        raise UsageError("there is no model to measure", "name at least one model directory")
    for path in paths:
        longest = Checkpoint(path).config.get("max_position_embeddings")
        if isinstance(longest, int) and positions > longest:
            raise ModelError(
                f"{path} reads at most {longest} tokens at once, {positions} are asked of it",
                f"make the window, or prompt and new tokens together, at most {longest}",
            )


def open_models(
    paths: Sequence[str | Path], dtype: str, device: torch.device
) -> list[PreTrainedModel]:
    """Open all models in one compute type (of `DTYPES`), on one device.

    Raises:
        ModelError: a model cannot be opened.
    """
    import torch

    return [load_causal_lm(path, dtype=getattr(torch, dtype)).to(device) for path in paths]


def notes_on(paths: Sequence[str | Path]) -> list[str]:
    """What a reader must know about the directories before comparing their speed."""
    notes = []
    for path in paths:
        try:
            kind = Manifest.read(path).kind
        except ModelError:  # not written by secateur: a dense model, as a rule
            continue
        if kind == "pruned":
            notes.append(
                f"{path} is pruned but not compiled: its zeros are stored and multiplied like "
                "other weights, so expect the size and speed of the dense model"
            )
    return notes


def notes_on_machine(environment: Environment) -> list[str]:
    """What of the machine makes the figures doubtful."""
    if environment.load_average > environment.cores / 2:
        return [
            f"the machine was busy before the measurement began (load average "
            f"{environment.load_average:.1f} on {environment.cores} cores)"
        ]
    return []
