"""Replies made by hand: a text per token, with the log-probabilities that a test wants."""

from __future__ import annotations

from typing import Any

from amulet import Reply, Steering, TokenTrace, Usage


def token(
    text: str, raised: float = 0.0, unsteered: str | None = None, base: float = -2.0
) -> TokenTrace:
    """Return the trace of a token that steering made `raised` nats likelier."""
    return TokenTrace(
        token_id=1,
        text=text,
        preferred=base + raised / 2,
        base=base,
        steered=base + raised,
        unsteered_id=1 if unsteered is None else 2,
        unsteered_text=text if unsteered is None else unsteered,
    )


def reply(text: str, *trace: TokenTrace, **fields: Any) -> Reply:
    """Return a reply with a trace, or without one where no token is given."""
    return Reply(
        **{
            "text": text,
            "token_ids": tuple(entry.token_id for entry in trace),
            "finish_reason": "stop",
            "usage": Usage(7, len(trace)),
            "steering": Steering(),
            "trace": trace or None,
            **fields,
        }
    )
