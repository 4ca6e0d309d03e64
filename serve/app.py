"""The OpenAI-compatible HTTP app over any `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import secateur
from secateur.serve import openapi
from secateur.serve.answers import Answer, ChatAnswer, CompletionAnswer, server_sent
from secateur.serve.constraint import Constraint, Grammars, SchemaRefused
from secateur.serve.engine import (
    Engine,
    EngineBusy,
    EngineUnavailable,
    Event,
    Generation,
    GenerationFault,
    GenerationRequest,
    RequestRefused,
    check_request,
)
from secateur.serve.http import (
    ApiKey,
    EventStream,
    answer_bug,
    answer_error,
    answer_http_error,
    answer_nobody,
    page_and_headers,
    unless_disconnected,
)
from secateur.serve.metrics import ServerMetrics
from secateur.serve.protocol import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    Message,
    TokenizeBody,
    parse,
)
from secateur.serve.status import status

MAX_BODY = 8 * 2**20
BODY_SECONDS = 60.0  # a body must have arrived by then


def create_app(
    engine: Engine, *, api_key: str | None = None, max_body: int = MAX_BODY
) -> Starlette:
    """The app that serves ``engine``; it neither starts nor closes the engine.

    Args:
        engine: what answers.
        api_key: if given, every path but `OPEN_PATHS` asks for it.
        max_body: bytes that a request body may have.
    """
    service = _Service(engine, max_body)
    description = openapi.document(with_key=bool(api_key))
    page, headers = page_and_headers()

    async def describe(_: Request) -> Response:
        return JSONResponse(description)

    async def show(_: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    handlers: tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...] = (
        ("POST", "/v1/completions", service.completions),
        ("POST", "/v1/chat/completions", service.chat),
        ("POST", "/tokenize", service.tokenize),
        ("POST", "/detokenize", service.detokenize),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("GET", "/v1/status", service.status),
        ("GET", "/health", service.health),
        ("GET", "/metrics", service.metrics_page),
        ("GET", "/version", service.version),
        ("GET", "/openapi.json", describe),
        ("GET", "/", show),
    )
    app = Starlette(
        routes=[Route(path, handler, methods=[method]) for method, path, handler in handlers],
        exception_handlers={
            ApiError: answer_error,
            HTTPException: answer_http_error,
            ClientDisconnect: answer_nobody,
            Exception: answer_bug,
        },
        middleware=[Middleware(ApiKey, key=api_key)] if api_key else [],
    )
    app.router.redirect_slashes = False
    return app


class _Service:
    """The handlers of one app."""

    def __init__(self, engine: Engine, max_body: int) -> None:
        self._engine = engine
        self._max_body = max_body
        self._metrics = ServerMetrics(engine)
        self._grammars = Grammars(engine.codec, engine.vocabulary_size, engine.end_tokens)
        self._created = int(time.time())

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._read(request))
        self._check_model(body.model)
        prompts = body.prompts()
        given = [
            prompt
            if isinstance(prompt, list)
            else await asyncio.to_thread(self._engine.codec.encode, prompt)
            for prompt in prompts
        ]
        most = 16 if body.max_tokens is None else body.max_tokens
        shape = GenerationRequest(
            (),
            max_tokens=most,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            client=_client(request, body),
        )
        wanted = await self._requests(body, given, shape)
        echoes: list[str | None] = [None] * len(wanted)
        if body.echo:
            echoes = [
                prompt
                if isinstance(prompt, str)
                else self._engine.codec.decode(prompt, keep_special=True)
                for prompt in prompts
                for _ in range(body.choices())
            ]
        generations = self._submit(wanted)
        answer = CompletionAnswer(
            self._engine.model_name,
            self._engine.codec,
            generations,
            body.choices(),
            echoes=echoes,
            logprobs=body.logprobs is not None,
        )
        return await self._answer(request, body, answer, generations)

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request))
        self._check_model(body.model)
        prompt = await self._encode_chat(body.messages)
        shape = GenerationRequest(
            (),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=body.alternatives(),
            client=_client(request, body),
        )
        generations = self._submit(await self._requests(body, [prompt], shape))
        answer = ChatAnswer(
            self._engine.model_name, self._engine.codec, generations, body.choices()
        )
        return await self._answer(request, body, answer, generations)

    async def tokenize(self, request: Request) -> Response:
        body = parse(TokenizeBody, await self._read(request))
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = await self._encode_chat(body.messages)
        else:
            special = body.add_special_tokens is not False
            tokens = await asyncio.to_thread(
                self._engine.codec.encode, body.prompt or "", special=special
            )
        return JSONResponse(
            {"count": len(tokens), "max_model_len": self._engine.max_length, "tokens": tokens}
        )

    async def detokenize(self, request: Request) -> Response:
        body = parse(DetokenizeBody, await self._read(request))
        self._check_model(body.model)
        if body.tokens and max(body.tokens) >= self._engine.vocabulary_size:
            raise ApiError(400, "a token id is out of range", "tokens", "invalid_token_id")
        return JSONResponse({"prompt": self._engine.codec.decode(body.tokens, keep_special=True)})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def status(self, _: Request) -> Response:
        return JSONResponse(status(self._engine, self._metrics.speed))

    async def health(self, _: Request) -> Response:
        reason = self._engine.unavailable()
        if reason is None:
            return JSONResponse({"status": "ok"})
        raise ApiError(503, reason, None, "unavailable")

    async def metrics_page(self, _: Request) -> Response:
        return Response(self._metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": secateur.__version__})

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._engine.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "secateur",
            "max_model_len": self._engine.max_length,
        }

    async def _read(self, request: Request) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > self._max_body:
                        message = f"the body is larger than {self._max_body} bytes"
                        raise ApiError(413, message, None, "request_too_large")
                    parts.append(part)
        except TimeoutError as fault:
            message = f"the body did not arrive within {BODY_SECONDS:g} seconds"
            raise ApiError(408, message, None, "request_timeout") from fault
        return b"".join(parts)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._engine.model_name):
            message = f"there is no model {name!r} here, only {self._engine.model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        codec = self._engine.codec
        if not codec.has_chat_template:
            message = "this model has no chat template; use /v1/completions"
            raise ApiError(400, message, "messages", "no_chat_template")

        def encode() -> list[int]:
            return codec.encode(
                codec.render_chat([message.plain() for message in messages]), special=False
            )

        try:
            return await asyncio.to_thread(encode)
        except Exception as fault:  # templates are programs: they refuse in whatever way they like
            message = f"the model's chat template refuses these messages: {fault}"
            raise ApiError(400, message, "messages") from fault

    async def _requests(
        self, body: GenerateBody, prompts: Sequence[Sequence[int]], shape: GenerationRequest
    ) -> list[GenerationRequest]:
        """One request per prompt and choice; ``shape`` has what only some bodies know."""
        shape = replace(
            shape,
            stop=body.stops(),
            stop_token_ids=frozenset(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
        )
        constraint = await self._constraint(body)
        return [
            replace(
                shape,
                prompt=tuple(prompt),
                sampling=body.sampling(choice),
                constraint=constraint and constraint.copy(),
            )
            for prompt in prompts
            for choice in range(body.choices())
        ]

    async def _constraint(self, body: GenerateBody) -> Constraint | None:
        schema = body.schema_text()
        if schema is None:
            return None
        try:
            return await asyncio.to_thread(self._grammars.compile, schema)
        except SchemaRefused as fault:
            raise ApiError(400, str(fault), "response_format", "unsupported") from fault

    def _submit(self, wanted: Sequence[GenerationRequest]) -> list[Generation]:
        """All of the requests or none."""
        submitted: list[Generation] = []
        try:
            for one in wanted:
                check_request(one, self._engine)
            for one in wanted:
                submitted.append(self._engine.submit(one))
        except (RequestRefused, EngineUnavailable, EngineBusy) as fault:
            for generation in submitted:
                generation.cancel()
            raise _refusal(fault) from fault
        return submitted

    async def _answer(
        self,
        request: Request,
        body: GenerateBody,
        answer: Answer,
        generations: Sequence[Generation],
    ) -> Response:
        if body.stream:
            stream = self._stream(answer, generations, with_usage=body.wants_usage())
            return EventStream(stream, generations)

        async def collect() -> Response:
            async with contextlib.aclosing(self._events(generations)) as events:
                async for index, event in events:
                    answer.keep(index, event)
            return JSONResponse(answer.whole())

        try:
            return await unless_disconnected(request, collect)
        except GenerationFault as fault:
            raise ApiError(500, str(fault), None, "generation_failed") from fault

    async def _stream(
        self, answer: Answer, generations: Sequence[Generation], *, with_usage: bool
    ) -> AsyncIterator[bytes]:
        async with contextlib.aclosing(self._events(generations)) as events:
            try:
                async for index, event in events:
                    for delta in answer.deltas(index, event):
                        yield answer.chunk([delta], with_usage=with_usage)
                if with_usage:
                    yield answer.chunk([], with_usage=True)
            except GenerationFault as fault:
                yield server_sent(ApiError(500, str(fault), None, "generation_failed").body())
        yield b"data: [DONE]\n\n"

    async def _events(
        self, generations: Sequence[Generation]
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all generations as they come; leaving early cancels what still runs."""
        queue: asyncio.Queue[tuple[int, Event | GenerationFault]] = asyncio.Queue()
        clocks = [self._metrics.follow(generation) for generation in generations]

        async def pump(index: int) -> None:
            try:
                async for event in generations[index]:
                    queue.put_nowait((index, event))
            except GenerationFault as fault:
                queue.put_nowait((index, fault))

        tasks = [asyncio.create_task(pump(index)) for index in range(len(generations))]
        running = len(tasks)
        try:
            while running:
                index, item = await queue.get()
                if isinstance(item, GenerationFault):
                    clocks[index].end("error")
                    raise item
                clocks[index].event(item)
                running -= item.finish_reason is not None
                yield index, item
        finally:
            for task, generation, clock in zip(tasks, generations, clocks, strict=True):
                task.cancel()
                generation.cancel()
                clock.end("abort")


def _client(request: Request, body: GenerateBody) -> str:
    """Whose request it is: as the body says, else by the address it came from."""
    if body.user:
        return f"user {body.user}"
    return request.client.host if request.client else ""


def _refusal(fault: RequestRefused | EngineUnavailable | EngineBusy) -> ApiError:
    if isinstance(fault, RequestRefused):
        return ApiError(400, str(fault), fault.param, fault.code)
    if isinstance(fault, EngineUnavailable):
        return ApiError(503, str(fault), None, "unavailable")
    wait = {"Retry-After": str(max(1, math.ceil(fault.retry_after)))}
    return ApiError(429, str(fault), None, "rate_limit_exceeded", wait)
