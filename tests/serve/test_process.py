"""The command as a process: key, port, signals; what is imported when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from .conftest import COMMAND, start_server


def test_api_key_name_and_a_clean_end_while_streaming(tiny: Path) -> None:
    server = start_server(tiny, "--served-model-name", "mine/tiny", SECATEUR_API_KEY="sesame")
    try:
        assert server.ready.startswith("serving mine/tiny at http://127.0.0.1:")
        for path in ("/health", "/metrics"):
            assert httpx.get(server.url + path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sesame"}):
            refused = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["mine/tiny"]
            stream = client.completions.create(
                model="mine/tiny",
                prompt="a",
                max_tokens=4000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            reasons = [next(iter(stream)).choices[0].finish_reason]
            server.process.send_signal(signal.SIGTERM)
            # A stream that is cut off instead of ended would raise here.
            reasons += [chunk.choices[0].finish_reason for chunk in stream]
            assert reasons[-1] in ("abort", "length")
            assert server.process.wait(20) == 0
        assert server.process.stdout is not None
        assert server.process.stdout.read() == ""
        server.process.stdout.close()
    finally:
        server.process.terminate()


def test_two_servers_on_one_copy_of_the_weights(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    servers = [
        start_server(tiny, "--cache-weights", "--values", "int8", SECATEUR_CACHE=str(cache))
        for _ in range(2)
    ]
    try:
        (file,) = (cache / "weights").iterdir()
        for server in servers:
            assert f"mapped from {file};" in server.ready
            assert str(file) in Path(f"/proc/{server.process.pid}/maps").read_text()
        body = {"model": tiny.name, "prompt": "ab", "max_tokens": 8, "temperature": 0}
        answers = [httpx.post(f"{one.url}/v1/completions", json=body).json() for one in servers]
        assert answers[0]["choices"] == answers[1]["choices"]
    finally:
        assert [server.stop(signal.SIGTERM) for server in servers] == [0, 0]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_port_in_use_is_found_before_the_model_is_opened(server: Any, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    ended = run(str(tmp_path / "no-model"), "--port", port)
    assert ended.returncode == 4
    assert f"port {port}: Address already in use" in ended.stderr
    assert "fix:" in ended.stderr


def test_faults_of_the_caller(tmp_path: Path) -> None:
    ended = run(str(tmp_path / "no-model"), "--port", "0")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "there is no model directory at" in ended.stderr
    ended = run(str(tmp_path), "--engine", "transfomers")
    assert ended.returncode == 2
    assert "did you mean 'transformers'" in ended.stderr


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [("no.such.host.invalid", 0, "unknown"), ("192.0.2.1", 0, "cannot listen")],
)
def test_hosts_that_cannot_be_had(host: str, port: int, words: str) -> None:
    from secateur.errors import EnvironmentFault
    from secateur.serve.server import listen

    with pytest.raises(EnvironmentFault, match=words):
        listen(host, port)


def test_importing_the_stage_is_cheap() -> None:
    code = "import sys, secateur.serve; print({'torch', 'fastapi', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_serve_in_process(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python call returns after a signal, with the handlers of before."""
    from secateur.serve import serve

    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should it come before the server listens to it
    kicks = threading.Event()

    def kick() -> None:
        while not kicks.wait(0.5):
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kick)
    thread.start()
    try:
        serve(tiny, host="0.0.0.0", port=0, engine="transformers", threads=1)
    finally:
        kicks.set()
        thread.join()
        signal.signal(signal.SIGTERM, handler)
    printed = capsys.readouterr()
    assert printed.out.startswith("serving tiny-llama at http://0.0.0.0:")
    assert "set --api-key" in printed.err
