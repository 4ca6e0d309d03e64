"""Writing a model directory in another form, file by file and tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from secateur.checkpoint import INDEX, Checkpoint, TensorWriter, write_index

# What is stored in the place of a tensor of the dense model, by name.
Stored = Callable[[str], Mapping[str, torch.Tensor]]


def write_shards(folder: Path, checkpoint: Checkpoint, stored: Stored) -> tuple[int, int]:
    """Write the weights and copy the companions; only one tensor is in memory at a time.

    Args:
        folder: where to.
        checkpoint: the dense model; each tensor stays in the file that it was in.
        stored: called for each of its tensors.

    Returns:
        Bytes of the weights as they were stored, and as they are now.
    """
    read = written = 0
    homes = {name: checkpoint.file_of(name) for name in checkpoint.names()}
    for file in checkpoint.files:
        with TensorWriter(folder / file.name) as writer:
            for name in (name for name, home in homes.items() if home == file):
                read += checkpoint.nbytes(name)
                for piece, tensor in stored(name).items():
                    writer.add(piece, tensor)
                    written += tensor.nbytes
    if (checkpoint.path / INDEX).exists():
        write_index(folder, [folder / file.name for file in checkpoint.files])
    for companion in checkpoint.companions():
        shutil.copyfile(companion, folder / companion.name)
    return read, written
