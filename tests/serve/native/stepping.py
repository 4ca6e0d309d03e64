"""Models to step through, and ragged batches of random pieces of texts with shuffled pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.serve.native.step import Batch, StepModel

Array = np.ndarray[Any, Any]


def make_batch(
    pieces: list[list[int]], positions: list[int], tables: list[list[int]], wanted: list[int]
) -> Batch:
    """A batch of plain lists; tables of unequal lengths are filled up with an impossible page."""
    width = max(map(len, tables))
    return Batch(
        np.array([token for piece in pieces for token in piece], np.int32),
        np.cumsum([0, *map(len, pieces)], dtype=np.int32),
        np.array(positions, np.int32),
        np.array([[*table, *[-1] * (width - len(table))] for table in tables], np.int32),
        np.array(wanted, np.int32),
    )


def random_steps(model: StepModel, texts: list[list[int]], rng: np.random.Generator) -> list[Array]:
    """The logits of all tokens of some texts, in steps with random pieces of random texts."""
    need = [-(-len(text) // model.page_tokens) for text in texts]
    pages = rng.permutation(model.pages)[: sum(need)]
    tables = [list(map(int, part)) for part in np.split(pages, np.cumsum(need)[:-1])]
    done, logits = [0] * len(texts), [list[Array]() for _ in texts]
    while any(done[i] < len(text) for i, text in enumerate(texts)):
        open_ = [i for i, text in enumerate(texts) if done[i] < len(text)]
        chosen = [i for i in open_ if rng.random() < 0.7] or open_[:1]
        sizes = [
            1 if rng.random() < 0.4 else int(rng.integers(1, len(texts[i]) - done[i] + 1))
            for i in chosen
        ]
        pieces = [texts[i][done[i] : done[i] + size] for i, size in zip(chosen, sizes, strict=True)]
        batch = make_batch(
            pieces, [done[i] for i in chosen], [tables[i] for i in chosen], [*range(sum(sizes))]
        )
        result = np.split(model.step(batch).copy(), batch.starts[1:-1])
        for i, size, rows in zip(chosen, sizes, result, strict=True):
            done[i] += size
            logits[i].append(rows)
    return [np.concatenate(parts) for parts in logits]


def save_random(directory: Path, model_type: str, **settings: Any) -> Path:
    """Save a random model of a family with odd sizes; weights large enough that all parts count."""
    import transformers

    defaults = {
        "vocab_size": 101,
        "hidden_size": 60,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **(defaults | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        center = float(parameter.ndim == 1 and "bias" not in name)
        torch.nn.init.normal_(parameter, mean=center, std=0.2)
    model.save_pretrained(directory)
    return directory


def reference(directory: Path, texts: list[list[int]]) -> list[Array]:
    """The logits of all tokens, by transformers' plain attention in float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0].float().numpy() for text in texts]


def random_texts(rng: np.random.Generator, vocabulary: int, lengths: list[int]) -> list[list[int]]:
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]
