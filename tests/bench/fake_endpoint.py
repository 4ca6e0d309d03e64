"""An endpoint that streams what it is told to, in its own thread, and notes what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What goes over the wire, piece by piece; a number is a pause in seconds.
Script = Callable[[dict[str, Any]], Iterator[bytes | float]]


def event(**content: Any) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def token(text: str) -> bytes:
    return event(choices=[{"index": 0, "text": text}], usage=None)


def usage(prompt: int, completion: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


DONE = b"data: [DONE]\n\n"


def answer(body: dict[str, Any]) -> Iterator[bytes | float]:
    """As many tokens as are asked for, and the count of everything."""
    for number in range(body["max_tokens"]):
        yield token(f" {number}")
    yield usage(len(body["prompt"].split()), body["max_tokens"])
    yield DONE


@dataclass
class Fake:
    url: str = ""
    script: Script = answer
    status: int = 200
    models: Any = field(default_factory=lambda: {"data": [{"id": "fake"}]})
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    most: int = 0  # requests under way at once
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def fake_endpoint() -> Iterator[Fake]:
    fake = Fake()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            fake.headers.append(dict(self.headers))
            self._whole(200 if fake.models else 401, fake.models or {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.bodies.append(body | {"path": self.path})
                fake.running += 1
                fake.most = max(fake.most, fake.running)
            try:
                if fake.status != 200:
                    self._whole(fake.status, {"error": {"message": "too busy"}})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in fake.script(body):
                    if isinstance(piece, float):
                        time.sleep(piece)
                    elif piece == b"":
                        self.close_connection = True  # cut off, without an end
                        return
                    else:
                        self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                        self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            finally:
                with fake.lock:
                    fake.running -= 1

        def _whole(self, status: int, content: Any) -> None:
            raw = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
