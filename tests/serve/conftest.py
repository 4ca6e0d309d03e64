"""A tiny random Llama with a byte-level tokenizer, and one server process for the session."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "the quick brown fox jumps over the lazy dog; Sphinx of black quartz, judge my vow. 0123456789"
)
COMMAND = [sys.executable, "-m", "secateur", "serve"]


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=320,
            show_progress=False,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_llama(directory: Path, hidden: int = 64, layers: int = 2) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=[0, 2],
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory."""
    return make_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Tiny models by name, as (pruned, packed) directories."""
    from tests.serve.hf_models import make_models

    return make_models(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes tens of seconds to fill its context."""
    return make_llama(tmp_path_factory.mktemp("models") / "slow-llama", hidden=1024, layers=6)


@pytest.fixture(scope="session")
def model(tiny: Path) -> Any:
    from secateur.model import load_causal_lm

    return load_causal_lm(tiny)


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    from secateur.model import load_tokenizer

    return load_tokenizer(tiny)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    ready: str

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(20)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()

    def metric(self, name: str) -> float:
        page = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^vllm:{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
        assert found, name
        return float(found[1])


def start_server(directory: Path, *options: str, **environment: str) -> Server:
    process = subprocess.Popen(
        [*COMMAND, str(directory), "--port", "0", "--threads", "1", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    ready = process.stdout.readline().strip()
    found = re.search(r"at (http://\S+)", ready)
    assert found, (ready, process.poll())
    return Server(process, found[1], ready)


ENGINES = {"native": ("--engine", "native", "--kv-cache-type", "fp32")}
ENGINES["transformers"] = ("--engine", "transformers")


@pytest.fixture(scope="session", params=ENGINES)
def server(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Server]:
    running = start_server(tiny, *ENGINES[request.param])
    yield running
    assert running.stop(signal.SIGINT) == 0


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
