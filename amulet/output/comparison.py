"""Compares three answers to a question: plain, preference in the prompt only, and steered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amulet.errors import RequestError
from amulet.preference import PreferenceLike, normal_preferences
from amulet.rendering.html import columns_html
from amulet.reply import Reply
from amulet.request import Request

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Comparison:
    """Three answers to one question; what `Amulet.compare` returns.

    A notebook shows them side by side, and so does rich's `print`: every token coloured by how
    much steering raised it.

    Attributes:
        plain: without the preference.
        prompted: with the preference in the prompt, not steered (strength 0).
        steered: as asked for.
    """

    plain: Reply
    prompted: Reply
    steered: Reply

    @property
    def columns(self) -> tuple[tuple[str, Reply], ...]:
        """The answers with their titles, in the order they are shown."""
        strength = self.steered.steering.strength if self.steered.steering else 0.0
        return (
            ("plain", self.plain),
            ("prompt only (strength 0)", self.prompted),
            (f"steered (strength {strength:g})", self.steered),
        )

    def _repr_html_(self) -> str:
        return columns_html(self.columns)

    def __rich__(self) -> RenderableType:
        from amulet.rendering.terminal import columns_terminal  # rich is slow to import

        return columns_terminal(self.columns)

    def __str__(self) -> str:
        return "\n\n".join(f"{title}:\n{reply.text}" for title, reply in self.columns)


def comparison_requests(
    question: str | Sequence[dict[str, Any]], preference: PreferenceLike, options: dict[str, Any]
) -> list[Request]:
    """Return the requests of a `Comparison`, in its order, each with a trace.

    Raises:
        RequestError: there is no preference, or an option is not valid.
    """
    shared = {**options, "messages": as_messages(question), "trace": True}
    steered = {**shared, "preference": wished(preference)}
    return [Request(**shared), Request(**{**steered, "strength": 0.0}), Request(**steered)]


def as_messages(question: str | Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return a chat: the one that was given, or one of a single question."""
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    return list(question) if isinstance(question, Iterable) else question  # `Request` refuses it


def wished(preference: PreferenceLike) -> PreferenceLike:
    """Return the preference.

    Raises:
        RequestError: it is none, so there is nothing to compare.
    """
    preferences = normal_preferences(preference)
    if not preferences:
        raise RequestError(
            f"preference={preference!r}: expected one that can be compared with a plain answer, "
            'such as "Answer in one short sentence.".'
        )
    return preferences
