"""The socket and the process around the app: listening, the ready line, a clean end."""

from __future__ import annotations

import errno
import math
import os
import signal
import socket
import sys
from types import FrameType

import uvicorn

from secateur.errors import EnvironmentFault
from secateur.serve.app import create_app
from secateur.serve.engine import Engine

HEADER_BYTES = 64 * 2**10


def listen(host: str, port: int) -> socket.socket:
    """A socket that already listens, so that nobody else can take the port meanwhile.

    Raises:
        EnvironmentFault: the address or the port cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as fault:
        raise EnvironmentFault(
            f"the host {host!r} is unknown: {fault.strerror}", "use --host 127.0.0.1"
        ) from fault
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as fault:
        listener.close()
        if fault.errno == errno.EADDRINUSE:
            fix = f"stop the program that uses it, or choose another: --port {port + 1}, --port 0"
        elif fault.errno == errno.EACCES:
            fix = "choose a port above 1023"
        else:
            fix = "use --host 127.0.0.1, or 0.0.0.0 for every address of this machine"
        raise EnvironmentFault(
            f"cannot listen on {host} port {port}: {os.strerror(fault.errno or 0)}", fix
        ) from fault
    return listener


class _Server(uvicorn.Server):
    """Announces itself when ready; on a signal the engine finishes what it can."""

    def __init__(
        self, config: uvicorn.Config, engine: Engine, ready: str, drain_seconds: float
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._ready = ready
        self._drain_seconds = drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.drain(0.0 if self.should_exit else self._drain_seconds)
        if not self.should_exit:  # a second signal ends the requests, not their connections
            super().handle_exit(sig, frame)


def run(
    engine: Engine,
    listener: socket.socket,
    *,
    host: str,
    api_key: str | None,
    drain_seconds: float,
) -> None:
    """Serve until SIGINT or SIGTERM, then return.

    Args:
        engine: what answers; not closed here.
        listener: from `listen`; closed at the end.
        host: as the user gave it, for the ready line.
        api_key: see `create_app`.
        drain_seconds: running requests get this long to finish after a signal.
    """
    port = listener.getsockname()[1]
    if api_key is None and not host.startswith(("127.", "localhost", "::1")):
        print(
            f"serve: anyone who reaches {host} can use this server; set --api-key",
            file=sys.stderr,
        )
    shown = f"[{host}]" if ":" in host else host
    ready = (
        f"serving {engine.model_name} at http://{shown}:{port} "
        f"(engine: {engine.name}; {engine.description})"
    )
    config = uvicorn.Config(
        create_app(engine, api_key=api_key),
        log_level="warning",
        access_log=False,
        server_header=False,
        http="h11",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=math.ceil(drain_seconds) + 5,
    )
    # uvicorn raises the signal again when it is done; the end it announces is not an error here.
    ignored = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        _Server(config, engine, ready, drain_seconds).run(sockets=[listener])
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)
