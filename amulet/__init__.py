"""Amulet: decode a local language model each user's own way, while it writes.

The names below are the public surface; torch and Transformers are imported when first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amulet.errors import (
    AmuletError,
    DecodeError,
    InterruptedDecodeError,
    MissingPackageError,
    ModelError,
    OutOfMemoryError,
    PromptTooLongError,
    RequestError,
    TemplateError,
)
from amulet.gain import game_gain
from amulet.preference import Preference, Steering
from amulet.request import Reply, Request, TokenTrace, Usage

if TYPE_CHECKING:
    from amulet.model import Amulet, ReplyStream

__version__ = "0.1.0"

__all__ = [
    "Amulet",
    "AmuletError",
    "DecodeError",
    "InterruptedDecodeError",
    "MissingPackageError",
    "ModelError",
    "OutOfMemoryError",
    "Preference",
    "PromptTooLongError",
    "Reply",
    "ReplyStream",
    "Request",
    "RequestError",
    "Steering",
    "TemplateError",
    "TokenTrace",
    "Usage",
    "game_gain",
]


def __getattr__(name: str) -> Any:
    if name in ("Amulet", "ReplyStream"):
        from amulet import model

        return getattr(model, name)
    raise AttributeError(f"module 'amulet' has no attribute {name!r}")
