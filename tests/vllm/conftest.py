"""Servers of the vLLM environment, which `make test-vllm` makes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from secateur.artifact import LayerFacts, Manifest
from secateur.bits import pack_mask
from secateur.checkpoint import save_tensors, write_json
from secateur.pattern import Pattern

PYTHON = os.environ.get("SECATEUR_VLLM_PYTHON", "")
VOCABULARY = 258
START_SECONDS = 600
# o_proj stays dense. v_proj, too, though vLLM merges it with q and k; it also merges gate
# and up, whose rows keep unequal numbers.
PATTERNS = {
    "q_proj": "2:4",
    "k_proj": "2:4",
    "gate_proj": "60%",
    "up_proj": "50%",
    "down_proj": "2:4",
}


def draw_mask(rows: int, columns: int, pattern: Pattern, generator: torch.Generator) -> Any:
    if not pattern.is_nm:
        order = torch.randperm(rows * columns, generator=generator)
        return (order >= pattern.removed_of(rows * columns)).reshape(rows, columns)
    scores = torch.rand(rows, columns // pattern.m, pattern.m, generator=generator)
    return (scores.argsort(-1).argsort(-1) < pattern.n).reshape(rows, columns)


def make_pruned(directory: Path, patterns: dict[str, str] = PATTERNS) -> Path:
    """A random Qwen2, which has biases, as `secateur prune` writes it."""
    import transformers

    from tests.conftest import tiny_tokenizer

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    masks, layers = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        if module.bias is not None:
            torch.nn.init.normal_(module.bias, generator=generator)
        shape, size = tuple(module.weight.shape), module.weight.nbytes
        text = patterns.get(name.rpartition(".")[2], "dense")
        facts: dict[str, Any] = {"shape": shape, "dense_bytes": size, "bytes": size}
        if text == "dense":
            layers[name] = LayerFacts(pattern="dense", kept_dense="asked", **facts)
            continue
        mask = draw_mask(*shape, Pattern.parse(text), generator)
        module.weight.data *= mask
        masks[f"{name}.weight"] = pack_mask(mask)
        sparsity = 1 - float(mask.float().mean())
        layers[name] = LayerFacts(pattern=text, sparsity=sparsity, **facts)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    save_tensors(directory / "masks.safetensors", masks)
    manifest = Manifest(
        kind="pruned",
        source={"model": "tiny"},
        recipe={"prune": {"pattern": "2:4"}},
        seed=0,
        layers=layers,
        notes=[],
    )
    write_json(directory / "manifest.json", manifest.model_dump(mode="json", by_alias=True))
    return directory


@dataclass
class Server:
    url: str
    log: Path

    def tokens(self, prompt: list[int], count: int = 24) -> list[int]:
        """What the model continues with, greedily."""
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        made: list[int] = answer.json()["choices"][0]["token_ids"]
        return made


def command(directory: Path, *options: str) -> list[str]:
    assert PYTHON, "these tests need an environment with vLLM: run `make test-vllm`"
    serve = [PYTHON, "-m", "secateur", "serve", str(directory), "--engine", "vllm"]
    sizes = ["--max-model-len", "256", "--kv-cache-memory-bytes", "64M"]
    return [*serve, "--served-model-name", "m", *sizes, *options]


@contextmanager
def served(directory: Path, log: Path, *options: str, **variables: str) -> Iterator[Server]:
    """A server until the block ends; it must end in order."""
    from secateur.serve.server import listen

    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            command(directory, "--port", str(port), *options),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < limit, log.read_text()[-4000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield Server(url, log)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pruned(tmp_path_factory.mktemp("vllm") / "pruned")


@pytest.fixture(scope="session")
def packed(pruned: Path) -> Path:
    """The same weights, packed; every value as it was."""
    from secateur.compile import pack_model

    directory = pruned.parent / "packed"
    pack_model(pruned, directory)
    return directory


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(2, VOCABULARY) for _ in range(2 * i + 1)] for i in range(20)]


@pytest.fixture(scope="session")
def expected(packed: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What the dense twin answers on the same engine."""
    from secateur.compile import write_dense

    twin = packed.parent / "twin"
    write_dense(packed, twin)
    with served(twin, packed.parent / "twin.log", "--enforce-eager") as server:
        return [server.tokens(prompt) for prompt in prompts]
