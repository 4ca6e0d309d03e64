"""The OpenAI-compatible HTTP app over any `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import secateur
from secateur.serve.answers import Answer, ChatAnswer, CompletionAnswer, server_sent
from secateur.serve.engine import (
    Engine,
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

MAX_BODY = 8 * 2**20


def create_app(engine: Engine, *, api_key: str | None = None, max_body: int = MAX_BODY) -> FastAPI:
    """The app that serves ``engine``; it neither starts nor closes the engine.

    Args:
        engine: what answers.
        api_key: if given, every path but /health and /metrics asks for it.
        max_body: bytes that a request body may have.
    """
    app = FastAPI(title="secateur", openapi_url=None, redirect_slashes=False)
    service = _Service(engine, max_body)
    for method, path, handler in (
        ("POST", "/v1/completions", service.completions),
        ("POST", "/v1/chat/completions", service.chat),
        ("POST", "/tokenize", service.tokenize),
        ("POST", "/detokenize", service.detokenize),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("GET", "/health", service.health),
        ("GET", "/metrics", service.metrics_page),
        ("GET", "/version", service.version),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    app.add_exception_handler(Exception, answer_bug)
    if api_key:
        app.add_middleware(ApiKey, key=api_key)
    return app


class _Service:
    """The handlers of one app."""

    def __init__(self, engine: Engine, max_body: int) -> None:
        self._engine = engine
        self._max_body = max_body
        self._metrics = ServerMetrics(engine)
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
        wanted = self._requests(
            body,
            given,
            16 if body.max_tokens is None else body.max_tokens,
            body.logprobs,
            body.logprobs if body.echo else None,
        )
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
        most = body.max_completion_tokens or body.max_tokens
        generations = self._submit(self._requests(body, [prompt], most, body.alternatives(), None))
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

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return JSONResponse(self._card())

    async def health(self) -> Response:
        reason = self._engine.unavailable()
        if reason is None:
            return JSONResponse({"status": "ok"})
        raise ApiError(503, reason, None, "unavailable")

    async def metrics_page(self) -> Response:
        return Response(self._metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def version(self) -> Response:
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
        async for part in request.stream():
            size += len(part)
            if size > self._max_body:
                message = f"the body is larger than {self._max_body} bytes"
                raise ApiError(413, message, None, "request_too_large")
            parts.append(part)
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

    def _requests(
        self,
        body: GenerateBody,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> list[GenerationRequest]:
        stops, stop_ids = body.stops(), frozenset(body.stop_token_ids or ())
        return [
            GenerationRequest(
                prompt=tuple(prompt),
                sampling=body.sampling(choice),
                max_tokens=max_tokens,
                stop=stops,
                stop_token_ids=stop_ids,
                ignore_eos=bool(body.ignore_eos),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            for prompt in prompts
            for choice in range(body.choices())
        ]

    def _submit(self, wanted: Sequence[GenerationRequest]) -> list[Generation]:
        """All of the requests or none."""
        submitted: list[Generation] = []
        try:
            for one in wanted:
                check_request(one, self._engine)
            for one in wanted:
                submitted.append(self._engine.submit(one))
        except RequestRefused as fault:
            raise ApiError(400, str(fault), fault.param, fault.code) from fault
        except EngineUnavailable as fault:
            for generation in submitted:
                generation.cancel()
            raise ApiError(503, str(fault), None, "unavailable") from fault
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
