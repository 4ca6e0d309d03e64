"""Tiny models that the tests make themselves, and the real one that `make model` fetches."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command does, before torch is loaded
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is; `make test-gpu` says 0

import pytest
import torch

# A shell's background jobs are started with SIGINT ignored, and so would be all that we start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_gpu_tests_not_run = 0


def pytest_deselected(items: list[pytest.Item]) -> None:
    global _gpu_tests_not_run
    _gpu_tests_not_run += sum(item.get_closest_marker("gpu") is not None for item in items)


def pytest_collection_finish(session: pytest.Session) -> None:
    chosen = [item for item in session.items if item.get_closest_marker("gpu")]
    if chosen and not session.config.option.collectonly and not torch.cuda.is_available():
        pytest.exit(f"no CUDA device here, which {len(chosen)} tests marked gpu need", returncode=4)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _gpu_tests_not_run:
        terminalreporter.write_line(
            f"gpu: {_gpu_tests_not_run} tests not run; `make test-gpu` does, with a CUDA device"
        )


ROOT = Path(__file__).resolve().parent.parent
REAL_MODEL = ROOT / "out" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# What each family adds to a tiny Llama: biases, q/k norms, scalings, sliding windows.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0},
    "gpt2": {"n_inner": 48},
    "falcon": {"alibi": True, "bias": True},
    "bloom": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 16,
    },
    "vit": {"image_size": 32, "patch_size": 8, "num_labels": 5},
    "deit": {"image_size": 32, "patch_size": 8, "num_labels": 5},
}
IMAGE_FAMILIES = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer: every byte is a token, so every text has one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_tiny(path: Path, family: str = "llama", shards: str = "10GB", **changes: Any) -> Path:
    """Save a random model of a family with two small blocks and a tokenizer."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    settings |= TINY_CONFIGS[family] | changes
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    if family in IMAGE_FAMILIES:
        model = getattr(transformers, IMAGE_FAMILIES[family])(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # norms, biases and tiny initial weights would hide bugs
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    model.save_pretrained(path, max_shard_size=shards)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`make_tiny`, for tests that need a model of their own."""
    return make_tiny


@pytest.fixture(scope="session")
def of_family(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[[str], Path]:
    """A tiny model of each family, made once; tests must not change it."""
    import transformers

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("dense") / family, family)
            if family in IMAGE_FAMILIES:
                size = {"height": 32, "width": 32}
                transformers.ViTImageProcessorPil(size=size).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Llama directory with tied embeddings; tests must not change it."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred lines of calibration text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"Line {i}: the quick brown fox jumps." for i in range(300)))
    return path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a dense fp32 directory."""
    from secateur.source import resolve_model

    if not REAL_MODEL.exists():
        pytest.fail(f"{REAL_MODEL.relative_to(ROOT)} is missing: run `make model` first")
    return resolve_model(str(REAL_MODEL), cache=tmp_path_factory.mktemp("models"))


class Ran(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def secateur_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run the command line in this process: what the console script does, without its start."""

    def run(*arguments: object) -> Ran:
        from secateur.cli import main

        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return Ran(code, *capsys.readouterr())

    return run
