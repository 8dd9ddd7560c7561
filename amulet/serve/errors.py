"""Errors as OpenAI's clients expect them: a status and JSON of message, type, param and code."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from amulet.aliases import advice
from amulet.errors import (
    AmuletError,
    DecodeError,
    MissingPackageError,
    ModelError,
    OutOfMemoryError,
    PromptTooLongError,
    RequestError,
    TemplateError,
)

# Where our name of an option is not OpenAI's.
PARAMS = {
    "grammar": "response_format",
    "max_new_tokens": "max_tokens",
    "template_options": "chat_template_kwargs",
}
# What the OpenAPI document says of each status.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description}
    for status, description in {
        400: "The request is not valid; `error.param` names the field.",
        401: "The API key is missing or wrong.",
        404: "There is no such model, preference, thumb or route.",
        413: "The body is too large.",
        429: "The queue is full; `Retry-After` tells when to try again.",
        503: "The model is being loaded, or the server shuts down or is out of memory or time.",
        507: "The file of preferences and thumbs is full.",
    }.items()
}
_LED = re.compile(r"([a-z_]+): (.*)", re.DOTALL)
_NAMED = re.compile(r"([a-z_]+)(?=[\[ .=:(])")


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: the HTTP status.
        message: what was given, what was expected, how to fix it.
        param: the field of the body that it is about.
        code: what a program tells errors apart by.
        retry_after: in how many seconds to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        # A client may send lone surrogates, which no answer can carry.
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        param = self.param and self.param.encode("utf-8", "replace").decode("utf-8")
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def from_amulet(error: AmuletError, fields: Sequence[str]) -> ApiError:
    """Return what the client is told of an `AmuletError`.

    Args:
        error: the error.
        fields: names of the body's fields; one of them at the message's beginning is the `param`.
    """
    message = str(error)
    if isinstance(error, RequestError):
        source = "messages" if "messages" in fields else "prompt"
        code = None
        param = _param(message, fields)
        if isinstance(error, PromptTooLongError):
            code, param = "context_length_exceeded", source
        elif isinstance(error, TemplateError):
            code, param = "template_error", param or source
        return ApiError(400, message, param=param, code=code)
    if type(error) is DecodeError and message.startswith("The grammar"):  # and it is the client's
        return ApiError(400, message, param=_param("grammar:", fields), code="grammar_error")
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, message, code="out_of_memory", retry_after=1)
    if isinstance(error, MissingPackageError | ModelError):
        return ApiError(501, message, code="not_supported")
    return ApiError(500, message, code="decode_error")


def from_validation(findings: Sequence[Mapping[str, Any]], known: Collection[str]) -> ApiError:
    """Return what the client is told of a body that doesn't fit its schema.

    The message names the fields, not what they held: it may be a prompt.

    Args:
        findings: pydantic's.
        known: names of the body's fields.
    """
    told: dict[str, list[str]] = {}
    for finding in findings:
        path = [part for part in finding["loc"] if part not in ("body", "query", "path")]
        field = str(path[0]) if path and isinstance(path[0], str) else "body"
        if len(path) > 1 and isinstance(path[1], int):
            field += f"[{path[1]}]"
        if finding["type"] == "extra_forbidden":
            field = ".".join(map(str, path))
            message = f"unknown option; {advice(field, known)}"
        else:
            message = str(finding["msg"]).removeprefix("Value error, ").rstrip(".")
            message = message[:1].lower() + message[1:]
        if field == "body" and (named := _LED.match(message)):  # of the body as a whole
            field, message = named.groups()
        messages = told.setdefault(field, [])
        if message not in messages:
            messages.append(message)
    text = "; ".join(f"{field}: {' or: '.join(messages)}" for field, messages in told.items())
    first = next(iter(told), None)
    return ApiError(400, f"{text}.", param=None if first == "body" else first)


def _param(message: str, fields: Sequence[str]) -> str | None:
    for name in _NAMED.findall(message):
        name = PARAMS.get(name, name)
        if name in fields:
            return str(name)
    return None
