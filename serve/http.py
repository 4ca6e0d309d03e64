"""HTTP around the endpoints: the key, error answers, clients that go away."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from importlib.resources import files
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from secateur.serve.engine import Generation
from secateur.serve.protocol import ApiError

OPEN_PATHS = ("/", "/health", "/metrics")
CLIENT_CLOSED_REQUEST = 499


def page_and_headers() -> tuple[str, dict[str, str]]:
    """The page at ``/``, and headers that bind it to its own script and its own server."""
    page = files("secateur.serve").joinpath("page.html").read_text(encoding="utf-8")
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    rules += ["form-action 'none'", "frame-ancestors 'none'"]
    for kind in ("script", "style"):
        found = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found)
        rules.append(f"{kind}-src " + " ".join(f"'sha256-{one.decode()}'" for one in digests))
    return page, {
        "Content-Security-Policy": "; ".join(rules),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


class ApiKey:
    """Lets only requests with the key through."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                fault = ApiError(
                    401, "send the API key as 'Authorization: Bearer KEY'", None, "invalid_api_key"
                )
                await JSONResponse(fault.body(), 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def answer_error(_: Request, fault: Exception) -> Response:
    """The error object of an `ApiError`."""
    assert isinstance(fault, ApiError)
    return JSONResponse(fault.body(), fault.status, fault.headers)


async def answer_http_error(request: Request, fault: Exception) -> Response:
    """The error object of an unknown path or a wrong method."""
    assert isinstance(fault, HTTPException)
    message = f"{request.method} {request.url.path}: {fault.detail}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(fault.status_code)
    return JSONResponse(
        ApiError(fault.status_code, message, None, code).body(), fault.status_code, fault.headers
    )


async def answer_nobody(_: Request, fault: Exception) -> Response:
    """The client left while it was sending its request."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def answer_bug(_: Request, fault: Exception) -> Response:
    """The error object of anything unforeseen; the traceback goes to the log."""
    return JSONResponse(ApiError(500, f"a bug: {type(fault).__name__}").body(), 500)


class EventStream(StreamingResponse):
    """A stream that lets go of its generations when it ends, even if it never began."""

    def __init__(self, content: AsyncIterator[bytes], generations: Sequence[Generation]) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generation in self._generations:
                generation.cancel()


async def unless_disconnected(
    request: Request, work: Callable[[], Coroutine[Any, Any, Response]]
) -> Response:
    """The result of ``work``, which is cancelled when the client goes away."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work()), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
