"""The README's commands, run in order as a newcomer would type them, on a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKE = {"make demo"}  # runs for minutes on the real model; test_run.py walks the same road


def test_readme(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    secateur_command: Callable[..., Any],
) -> None:
    shutil.copytree(tiny, tmp_path / "my-model")
    (tmp_path / "recipe.yaml").write_text(
        "model: my-model\noutput: out\ncalibration: {samples: 4, length: 32}\n"
        "bench:\n  accuracy: {window: 32, windows: 2}\n"
        "  latency: {prompt: 8, new_tokens: 2, rounds: 2, min_seconds: 0}\n"
    )
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ran = 0
    with ExitStack() as servers:
        for language, block in blocks:
            if language == "python":
                subprocess.run([sys.executable, "-c", block], check=True)
                ran += 1
                continue
            for line in block.splitlines():
                command, *arguments = shlex.split(line)
                if line in MAKE:
                    continue
                assert command == "secateur"
                if arguments[0] == "serve":
                    servers.enter_context(running_server(arguments))
                else:
                    done = secateur_command(*arguments)
                    assert done.returncode == 0, f"{line}: {done.stderr}"
                ran += 1
    assert ran >= 12


@contextmanager
def running_server(arguments: list[str]) -> Iterator[None]:
    """A server that has said that it is ready, and ends well when told to."""
    command = [sys.executable, "-m", "secateur", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert "http://127.0.0.1:8077" in server.stdout.readline()
        yield
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
