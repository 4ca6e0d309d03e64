"""What `bench methods` does in processes of their own besides pruning."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from secateur import recipe
from secateur.calibration import calibration_inputs
from secateur.checkpoint import Checkpoint, save_tensors
from secateur.device import choose_device
from secateur.model import StreamedModel
from secateur.walk import Walk

if TYPE_CHECKING:
    import torch


def time_dense_passes(
    model: str, data: str, samples: int, length: int, seed: int, device: str = "auto"
) -> float:
    """Seconds of the least that a calibrated walk does: load, run twice and free every block.

    No statistics, no pruning. The time of a pass does not depend on what the text says; without
    any it is Python's language reference.
    """
    import torch

    place = choose_device(device)
    dtype = torch.float32 if place.type == "cpu" else None  # as prune
    streamed = StreamedModel(Checkpoint(model), place, dtype)
    text = "pydoc" if data == "none" else data
    inputs = calibration_inputs(
        streamed, recipe.Calibration(data=text, samples=samples, length=length, seed=seed)
    )
    begun = _now(place)
    walk = Walk(streamed, inputs, frozenset())
    for index in range(len(streamed.blocks)):
        streamed.load_block(index)
        walk.advance(index)
        walk.advance(index)
        streamed.free_block(index)
    return _now(place) - begun


def write_own_text(model: str, calibration: str, device: str, file: str) -> None:
    """Let a model write its calibration text, into a file that ``--data`` takes.

    Args:
        calibration: the recipe's section as JSON.
    """
    import torch

    place = choose_device(device)
    dtype = torch.float32 if place.type == "cpu" else None  # as prune
    streamed = StreamedModel(Checkpoint(model), place, dtype)
    wanted = recipe.Calibration.model_validate_json(calibration)
    save_tensors(Path(file), calibration_inputs(streamed, wanted))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.monotonic()
