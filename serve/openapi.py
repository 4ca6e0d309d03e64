"""``/openapi.json``: the paths, the fields that are understood, and the statuses of answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import secateur
from secateur.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/completions": (CompletionBody, "Continue texts."),
    "/v1/chat/completions": (ChatBody, "Answer in a conversation."),
    "/tokenize": (TokenizeBody, "Token ids of a text or a conversation."),
    "/detokenize": (DetokenizeBody, "The text of token ids."),
}
_PAGES: dict[str, tuple[str, str]] = {
    "/v1/models": ("application/json", "The model."),
    "/v1/status": ("application/json", "What runs, on what, how fast."),
    "/health": ("application/json", "Whether requests are taken."),
    "/version": ("application/json", "The version of secateur."),
    "/metrics": ("text/plain", "Prometheus metrics."),
    "/": ("text/html", "A page to talk to the model."),
}
_ERRORS = {
    400: "The request is malformed, or asks for what the model cannot do.",
    401: "The API key is missing or wrong.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests wait; Retry-After says when to come again.",
    500: "The generation failed.",
    503: "The server takes no requests: it ends, or its engine has failed.",
}
_NULLABLE = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE,
                "code": _NULLABLE,
            },
        }
    },
}


def document(*, with_key: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    Args:
        with_key: whether the server asks for an API key.
    """
    _, schemas = models_json_schema(
        [(body, "validation") for body, _ in _BODIES.values()],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {
        path: {"post": _operation(text, "application/json", body.__name__)}
        for path, (body, text) in _BODIES.items()
    }
    paths |= {path: {"get": _operation(text, kind)} for path, (kind, text) in _PAGES.items()}
    components: dict[str, Any] = {"schemas": {**schemas["$defs"], "Error": _ERROR}}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "secateur", "version": secateur.__version__},
        "paths": paths,
        "components": components,
    }
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def _operation(text: str, kind: str, body: str | None = None) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "Done.", "content": {kind: {}}}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, reason in _ERRORS.items():
        answers[str(status)] = {"description": reason, "content": error}
    operation: dict[str, Any] = {"summary": text, "responses": answers}
    if body is not None:
        if body in (CompletionBody.__name__, ChatBody.__name__):
            answers["200"]["content"]["text/event-stream"] = {}
        schema = {"$ref": f"#/components/schemas/{body}"}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation
