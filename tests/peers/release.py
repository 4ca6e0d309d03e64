"""Runs inside a release of compressed-tensors, as a process of its own: reads and writes models.

    python release.py JOBS.json

JOBS.json is a list. ``{"read": DIR, "to": FILE}`` decompresses a model into the dense weights that
the release sees. ``{"like": DIR, "weights": FILE, "to": FILE2}`` compresses the dense weights, and
scales, of FILE in the way that DIR's config.json says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationStatus,
    apply_quantization_config,
)
from safetensors.torch import load_file, save_file


def empty_model(directory: Path) -> tuple[Any, Any]:
    """The model of a config.json without its weights, and what the release makes of the config."""
    config = transformers.AutoConfig.from_pretrained(str(directory))
    compressor = ModelCompressor.from_compression_config(config.quantization_config)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    return model, compressor


def read(directory: Path, to: Path) -> None:
    model, compressor = empty_model(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # whatever is not read shows
    plain = {
        name: tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
        if name in model.state_dict()
    }
    model.load_state_dict(plain, strict=False)
    compressor.decompress(str(directory), model)
    weights = dict(model.named_parameters())
    kept = {name: p.detach().clone() for name, p in weights.items() if "weight_" not in name}
    save_file(kept, to)


def write(like: Path, weights: Path, to: Path) -> None:
    model, compressor = empty_model(like)
    tensors = load_file(weights)
    if compressor.quantization_config is not None:
        config = compressor.quantization_config
        config.quantization_status = QuantizationStatus.FROZEN
        apply_quantization_config(model, config)
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        owner, _, parameter = name.rpartition(".")
        setattr(modules[owner], parameter, torch.nn.Parameter(tensor, requires_grad=False))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in tensors}
    compressed = compressor.compress(model, state)
    save_file({name: tensor.contiguous() for name, tensor in compressed.items()}, to)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "read" in job:
            read(Path(job["read"]), Path(job["to"]))
        else:
            write(Path(job["like"]), Path(job["weights"]), Path(job["to"]))
