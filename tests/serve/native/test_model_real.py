"""SmolLM2: the same greedy text as transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from secateur.serve.native.model import NativeModel
from tests.serve.native.stepping import make_batch

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
]


def test_greedy_text_is_that_of_transformers(smollm2: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    texts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    wanted = [
        model.generate(torch.tensor([text]), max_new_tokens=30, do_sample=False)[0].tolist()
        for text in texts
    ]
    with NativeModel.open(smollm2, kv_type="fp32", kv_bytes=64 << 20) as native:
        tables = [[*range(8 * i, 8 * i + 8)] for i in range(len(texts))]
        new, done = [list(text) for text in texts], [0] * len(texts)
        for _ in range(30):
            ends = [sum(map(len, new[: i + 1])) - 1 for i in range(len(new))]
            logits = native.step(make_batch(new, done, tables, ends))
            for i, rows in enumerate(logits):
                done[i] += len(new[i])
                new[i] = [int(rows.argmax())]
                texts[i] += new[i]
    for found, right in zip(texts, wanted, strict=True):
        assert found[: len(right)] == right
