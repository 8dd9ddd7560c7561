"""What a server permits, and who is being answered or waits: `Limits` and `Traffic`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from amulet.errors import RequestError
from amulet.preference import Steering, row_weights
from amulet.request import Request
from amulet.serve.errors import ApiError

State = Literal["loading", "ready", "draining"]


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may ask for.

    Attributes:
        queue: requests that may wait for a place in the batch; further ones get status 429.
        body_bytes: size of a request's body.
        prompt_tokens: tokens of a prompt, the preference included; None is the context window.
        max_tokens: tokens of one answer, and what an answer gets that asks for no number.
        seconds: time for one request. What is decoded by then is the answer.
        preferences: preferences per request; each costs a row of the batch.
        choices: answers per request: prompts times `n`.
        grammar_bytes: size of a grammar, JSON schema, or the tools of a forced call.
        thumbs: thumbs that are kept per user.

    Raises:
        RequestError: a number is out of its range.
    """

    queue: int = 64
    body_bytes: int = 4 * 2**20
    prompt_tokens: int | None = None
    max_tokens: int = 4096
    seconds: float = 600.0
    preferences: int = 4
    choices: int = 16
    grammar_bytes: int = 2**16
    thumbs: int = 1000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("queue", "preferences") else 1e-3 if name == "seconds" else 1
            if value is not None and not value >= least:
                raise RequestError(f"{name}={value!r}: expected {least:g} or more.")


def rows_of(request: Request, default: Steering) -> int:
    """Return how many rows of the batch a request takes, at most; `default` steers it."""
    steering = request.steering(default)
    return 1 + len(row_weights(request.preference, steering.strength, steering.focus))


class Traffic:
    """Counts the requests that are being answered; used in the event loop's thread only.

    Args:
        rows: rows that the engine decodes at once. It takes requests in their order.
        limits: how many may wait.
    """

    def __init__(self, rows: int, limits: Limits) -> None:
        self.state: State = "loading"
        self.rows = rows
        self._limits = limits
        self._entered: dict[object, int] = {}
        self._seconds = 1.0  # of a usual request

    def __len__(self) -> int:
        return len(self._entered)

    @property
    def waiting(self) -> int:
        """How many requests have no place in the batch yet."""
        taken = 0
        for place, rows in enumerate(self._entered.values()):
            if taken and taken + rows > self.rows:
                return len(self._entered) - place
            taken += rows
        return 0

    def enter(self, rows: int) -> object:
        """Take a place in the queue for a request; return the ticket that `leave` takes.

        Raises:
            ApiError: the queue is full (429).
        """
        waiting = self.waiting
        ticket = object()
        self._entered[ticket] = rows
        if self.waiting > self._limits.queue:
            del self._entered[ticket]
            raise ApiError(
                429,
                f"The queue is full: {waiting} requests wait, {self._limits.queue} may. "
                "Send the request again later.",
                code="queue_full",
                retry_after=min(60.0, self._seconds * (waiting + 1) / max(1, len(self) - waiting)),
            )
        return ticket

    def leave(self, ticket: object, seconds: float) -> None:
        """Give a place back; `seconds` is how long it was taken."""
        if self._entered.pop(ticket, None) is not None:
            self._seconds += 0.1 * (seconds - self._seconds)
