"""Amulet: steers a local language model towards each user's preference while it decodes.

The names below are the public surface; torch and Transformers are imported when first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from amulet.game import game_gain
from amulet.grammar import Grammar
from amulet.models.collector import paused_collector
from amulet.output.comparison import Comparison
from amulet.output.curve import StrengthCurve
from amulet.preference import Preference, Steering
from amulet.reply import Event, InvalidToolCall, Reply, TokenTrace, ToolCall, Usage
from amulet.request import Request

if TYPE_CHECKING:
    from amulet.model import Amulet
    from amulet.output.async_stream import AsyncReplyStream
    from amulet.output.stream import ReplyStream

__version__ = "0.1.0"

__all__ = [
    "Amulet",
    "AmuletError",
    "AsyncReplyStream",
    "Comparison",
    "DecodeError",
    "Event",
    "Grammar",
    "InvalidToolCall",
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
    "StrengthCurve",
    "TemplateError",
    "TokenTrace",
    "ToolCall",
    "Usage",
    "game_gain",
]


def __getattr__(name: str) -> Any:
    if name in ("Amulet", "AsyncReplyStream", "ReplyStream"):
        with paused_collector():
            from amulet import model

        return getattr(model, name)
    raise AttributeError(f"module 'amulet' has no attribute {name!r}")
