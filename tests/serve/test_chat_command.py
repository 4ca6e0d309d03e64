"""`secateur chat` as a process: piped lines, a template or none, an interrupt."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

COMMAND = [sys.executable, "-m", "secateur", "chat"]


def chat(directory: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, str(directory), "--threads", "1", *options],
        input=lines,
        capture_output=True,
        text=True,
        timeout=100,
    )


def greedy(model: Any, tokenizer: Any, text: str, *, special: bool) -> str:
    """What transformers generates in 5 tokens."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, pad_token_id=0
    )
    answer: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_conversation_from_a_pipe(engine: str, tiny: Path, model: Any, tokenizer: Any) -> None:
    options = [
        "--temperature",
        "0",
        "--max-tokens",
        "5",
        "--engine",
        engine,
        "--system",
        "be brief",
    ]
    ended = chat(tiny, "jump\n\nover the dog\n/reset\njump\n/exit\nnever read\n", *options)
    assert ended.returncode == 0, ended.stderr
    turns = [{"role": "system", "content": "be brief"}]
    expected = []
    for line in ("jump", "over the dog"):
        turns.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        expected.append(greedy(model, tokenizer, text, special=False))
        turns.append({"role": "assistant", "content": expected[-1]})
    shown = "".join(f"{answer}\n" for answer in (*expected, expected[0]))
    assert ended.stdout == "".join(c for c in shown if c >= " " or c in "\t\n")
    assert f"({engine};" in ended.stderr
    assert "a new conversation" in ended.stderr
    assert ended.stderr.count("tokens/s, first") == 3


def test_a_model_without_a_template_continues(
    tiny: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    plain = shutil.copytree(tiny, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    ended = chat(plain, "the quick\n brown\n", "--temperature", "0", "--max-tokens", "5")
    first = greedy(model, tokenizer, "the quick", special=True)
    second = greedy(model, tokenizer, f"the quick{first} brown", special=True)
    shown = f"{first}\n{second}\n"
    assert ended.stdout == "".join(c for c in shown if c >= " " or c in "\t\n")
    assert "no chat template" in ended.stderr


def test_faults_leave_the_conversation_open(tiny: Path) -> None:
    ended = chat(tiny, "a " * 9000 + "\nshort\n", "--max-tokens", "5", "--seed", "1")
    assert ended.returncode == 0
    assert "maximum context length" in ended.stderr
    assert ended.stderr.count("tokens/s, first") == 1
    assert chat(tiny, "", "--top-p", "0").returncode == 2


def test_an_interrupt_stops_the_answer_only(slow: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(slow, tmp_path / "endless")
    settings = directory / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": 10**6}))  # never drawn
    mine, its = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, str(directory), "--threads", "1", "--engine", "native", "--seed", "0"],
        stdin=its,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(its)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.write(mine, b"go on\n")
        shown = b""
        while len(shown.removeprefix(b"> ").strip()) < 3:
            shown += process.stdout.read1(100)
        process.send_signal(signal.SIGINT)
        os.write(mine, b"/reset\n/exit\n")
        process.stdout.read()
        said = process.stderr.read().decode()
        assert process.wait(20) == 0
    os.close(mine)
    assert "interrupted]" in said
    assert "a new conversation" in said
    assert "Traceback" not in said
