"""Converts errors of a server and its connection to the `AmuletError`s of a local model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import openai

from amulet.errors import (
    AmuletError,
    DecodeError,
    ModelError,
    OutOfMemoryError,
    PromptTooLongError,
    RequestError,
    TemplateError,
)

_BY_CODE: Mapping[str, type[AmuletError]] = {
    "context_length_exceeded": PromptTooLongError,
    "template_error": TemplateError,
    "out_of_memory": OutOfMemoryError,
    "grammar_error": DecodeError,
    "model_not_found": ModelError,
    "not_supported": ModelError,
}


@contextmanager
def told() -> Iterator[None]:
    """Convert errors of the package `openai` that are raised in the block."""
    try:
        yield
    except openai.APIError as error:
        raise to_amulet(error) from error


def to_amulet(error: openai.APIError) -> AmuletError:
    """Return the error that a local model would have raised."""
    if isinstance(error, openai.APITimeoutError):
        return DecodeError(
            "The server did not answer in time; give connect(...) a longer timeout, or retry."
        )
    if isinstance(error, openai.APIConnectionError):
        return DecodeError(
            f"The server at {error.request.url.host}:{error.request.url.port} can't be reached, or "
            f"closed the connection ({error.__cause__ or error}); is it running?"
        )
    body: Any = error.body
    message = body.get("message") if isinstance(body, Mapping) else None
    message = str(message or error.message)
    if kind := _BY_CODE.get(error.code or ""):
        return kind(message)
    status = getattr(error, "status_code", 500)
    if status in (401, 403):
        return RequestError(f"api_key: {message}")
    if status in (400, 413, 422):
        return RequestError(message)
    if status in (404, 405, 501):
        return ModelError(message)
    return DecodeError(message)
