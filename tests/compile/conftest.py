"""Pruned directories made from tiny random models, without secateur.prune."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from secateur.artifact import LayerFacts, Manifest
from secateur.checkpoint import write_json
from secateur.pattern import Pattern

PATTERNS = ["2:4", "4:8", "1:4", "4:16", "50%", "62.5%", "2:4@16x1", "50%@4x1", "50%@8x1"]


def brute_mask(rows: int, columns: int, pattern: Pattern, seed: int = 0) -> torch.Tensor:
    """A random mask of the pattern, one position at a time."""
    draw = random.Random(seed)
    mask = [[False] * columns for _ in range(rows)]
    blocks = rows // pattern.rows
    if pattern.is_nm:
        kept = [
            (block, start + i)
            for block in range(blocks)
            for start in range(0, columns, pattern.m)
            for i in draw.sample(range(pattern.m), pattern.n)
        ]
    else:
        places = [(block, column) for block in range(blocks) for column in range(columns)]
        kept = draw.sample(places, len(places) - pattern.removed_of(len(places)))
    for block, column in kept:
        for row in range(block * pattern.rows, (block + 1) * pattern.rows):
            mask[row][column] = True
    return torch.tensor(mask)


def brute_bits(mask: torch.Tensor, height: int) -> torch.Tensor:
    """The bits of a mask, one position at a time."""
    (rows, columns), kept = mask.shape, mask.tolist()
    bits = [[0] * ((columns + 7) // 8) for _ in range(rows // height)]
    for row in range(rows // height):
        for column in range(columns):
            bits[row][column // 8] |= kept[row * height][column] << (column % 8)
    return torch.tensor(bits, dtype=torch.uint8).reshape(rows // height, (columns + 7) // 8)


def tiny_model(kind: str, hidden: int, inner: int, tied: bool) -> transformers.PreTrainedModel:
    """A two-block random model; biases, if it has any, are not zero."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def prune_by_hand(
    directory: Path,
    pattern: str = "2:4",
    *,
    kind: str = "llama",
    hidden: int = 48,
    inner: int = 64,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    dense: tuple[str, ...] = (),
) -> Path:
    """Write what `secateur prune` writes."""
    chosen = Pattern.parse(pattern)
    model = tiny_model(kind, hidden, inner, tied).to(dtype)
    masks, layers = {}, {}
    for number, (name, module) in enumerate(model.model.layers.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        name, (rows, columns) = f"model.layers.{name}", module.weight.shape
        facts = {"shape": (rows, columns), "dense_bytes": module.weight.nbytes}
        if name.endswith(dense) and dense:
            layers[name] = LayerFacts(
                pattern="dense", kept_dense="asked", bytes=module.weight.nbytes, **facts
            )
            continue
        mask = brute_mask(rows, columns, chosen, number)
        module.weight.data = module.weight.data.masked_fill(~mask, 0.0)
        masks[f"{name}.weight"] = brute_bits(mask, chosen.rows)
        sparsity = 1 - float(mask.float().mean())
        layers[name] = LayerFacts(
            pattern=pattern, sparsity=sparsity, bytes=module.weight.nbytes, **facts
        )
    model.save_pretrained(directory, max_shard_size=shard)
    save_file(masks, directory / "masks.safetensors")
    (directory / "tokenizer_config.json").write_text("{}\n")
    manifest = Manifest(
        kind="pruned",
        source={"model": "tiny"},
        recipe={"prune": {"pattern": pattern}},
        seed=3,
        layers=layers,
        notes=["pruned by hand"],
    )
    write_json(directory / "manifest.json", manifest.model_dump(mode="json", by_alias=True))
    return directory


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str) -> None:
    """Load a safetensors file, let ``change`` edit its tensors, and store it again."""
    tensors = load_file(directory / file)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def pruned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune_by_hand(tmp_path_factory.mktemp("once") / "pruned", hidden=36, inner=44)


@pytest.fixture
def pruned(pruned_once: Path, tmp_path: Path) -> Path:
    """A 2:4 Llama whose rows are no multiple of 8 columns: bitmasks have padding."""
    return Path(shutil.copytree(pruned_once, tmp_path / "pruned"))
