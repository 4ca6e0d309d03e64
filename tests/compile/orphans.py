"""Tiny checkpoints in every orphaned form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.compile import write_compressed_tensors, write_marlin24
from tests.compile.conftest import prune_by_hand, rewrite

# The pattern that was pruned, and how it is written; tests/peers shows that these are the bytes
# that the programs of their time wrote.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "24": ("2:4", {}),
    "24-fp8": ("2:4", {"values": "fp8"}),
    "24-int8": ("2:4", {"values": "int8"}),
    "bitmask": ("4:8", {}),
    "bitmask-int8": ("50%", {"values": "int8", "scales": "tensor"}),
    "old": ("50%@4x1", {"era": "0.8"}),
    "marlin-int4": ("2:4", {"values": "int4", "quantize": "rtn"}),
    "marlin-int8": ("2:4", {"values": "int8", "quantize": "rtn", "scales": "channel"}),
}


def away_from_zero(tensors: dict[str, torch.Tensor]) -> None:
    """Let no kept weight round to zero: where zeros stand in a group is a reader's to choose."""
    for tensor in tensors.values():
        tensor += tensor.sign() * 0.05


def write_orphan(folder: Path, name: str) -> Path:
    """A form in FOLDER/NAME, and the model in bf16 that was pruned for it in FOLDER/NAME.pruned."""
    pattern, options = FORMS[name]
    marlin = name.startswith("marlin")
    pruned = prune_by_hand(
        folder / f"{name}.pruned",
        pattern,
        hidden=128 if marlin else 32,
        inner=384 if marlin else 48,
        dtype=torch.bfloat16,
        dense=("k_proj", "v_proj"),
        shard="30KB",
        tied=name == "24",
    )
    for file in sorted(pruned.glob("model*.safetensors")):
        rewrite(pruned, away_from_zero, file.name)
    write: Any = write_marlin24 if marlin else write_compressed_tensors
    write(pruned, folder / name, **options)
    (folder / name / "manifest.json").unlink()  # as others wrote it
    return folder / name
