"""Errors in OpenAI's format: a status, and JSON with message, type, param and code."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from amulet.aliases import advice
from amulet.errors import (
    MOST_SHOWN,
    AmuletError,
    DecodeError,
    MissingPackageError,
    ModelError,
    OutOfMemoryError,
    PromptTooLongError,
    RequestError,
    TemplateError,
)

# Options whose name differs from OpenAI's.
PARAMS = {
    "grammar": "response_format",
    "max_new_tokens": "max_tokens",
    "template_options": "chat_template_kwargs",
}
# Descriptions of the statuses for the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description}
    for status, description in {
        400: "The request is invalid; `error.param` names the field.",
        401: "The API key is missing or wrong.",
        404: "There is no such model, preference, thumb or route.",
        413: "The body is too large.",
        429: "The queue is full; `Retry-After` says when to retry.",
        503: "The model is loading, or the server is shutting down or out of memory or time.",
        507: "The file for preferences and thumbs is full.",
    }.items()
}
MOST_TOLD = 20  # findings in one message; a hostile body has very many
_LED = re.compile(r"([a-z_]+): (.*)", re.DOTALL)
_NAMED = re.compile(r"\b([a-z_]+)(?=[\[ .=:(])")


class ApiError(Exception):
    """An error response.

    Args:
        status: the HTTP status.
        message: what was given, what was expected, how to fix it.
        param: the field of the body that is wrong.
        code: identifies the error for programs.
        retry_after: seconds after which to retry.
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
        """The JSON of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        # A client may send lone surrogates, which no response can contain.
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        param = self.param and self.param.encode("utf-8", "replace").decode("utf-8")
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the status requires."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def from_amulet(error: AmuletError, fields: Sequence[str]) -> ApiError:
    """Convert an `AmuletError` to the client's error.

    Args:
        error: the error.
        fields: names of the body's fields. One at the start of the message becomes `param`.
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
    if type(error) is DecodeError and message.startswith("The grammar"):  # the client's own grammar
        return ApiError(400, message, param=_param("grammar:", fields), code="grammar_error")
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, message, code="out_of_memory", retry_after=1)
    if isinstance(error, MissingPackageError | ModelError):
        return ApiError(501, message, code="not_supported")
    return ApiError(500, message, code="decode_error")


def from_validation(findings: Sequence[Mapping[str, Any]], known: Collection[str]) -> ApiError:
    """Convert the errors of a body that doesn't match its schema.

    The message names the fields but not their contents, which may be a prompt.

    Args:
        findings: pydantic's errors.
        known: names of the body's fields.
    """
    told: dict[str, list[str]] = {}
    for finding in findings[:MOST_TOLD]:
        path = [part for part in finding["loc"] if part not in ("body", "query", "path")]
        field = str(path[0]) if path and isinstance(path[0], str) else "body"
        if len(path) > 1 and isinstance(path[1], int):
            field += f"[{path[1]}]"
        if finding["type"] == "extra_forbidden":
            field = ".".join(map(str, path))[:MOST_SHOWN]  # close names take long to find
            message = f"unknown option; {advice(field, known)}"
        else:
            message = str(finding["msg"]).removeprefix("Value error, ").rstrip(".")
            message = message[:1].lower() + message[1:]
        if field == "body" and (named := _LED.match(message)):  # about the body as a whole
            field, message = named.groups()
        messages = told.setdefault(field, [])
        if message not in messages:
            messages.append(message)
    text = "; ".join(f"{field}: {' or: '.join(messages)}" for field, messages in told.items())
    if (more := len(findings) - MOST_TOLD) > 0:
        text += f"; and {more} more"
    first = next(iter(told), None)
    return ApiError(400, f"{text}.", param=None if first == "body" else first)


def _param(message: str, fields: Sequence[str]) -> str | None:
    for name in _NAMED.findall(message):
        name = PARAMS.get(name, name)
        if name in fields:
            return str(name)
    return None
