"""The limits of requests, and the queue: `Limits` and `Traffic`."""

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
    """The limits of one request, and of all requests together.

    Attributes:
        queue: requests that may wait for a place in the batch; more get status 429.
        body_bytes: size of a request body.
        prompt_tokens: tokens of a prompt, the preference included; None is the context window.
        max_tokens: tokens of an answer, and the default of requests that set no limit.
        seconds: time for a request; the answer ends with the tokens decoded by then.
        preferences: preferences per request; each costs a row of the batch.
        choices: answers per request: prompts times `n`.
        grammar_bytes: size of a grammar, JSON schema, or the tools of a forced call.
        thumbs: thumbs kept per user.

    Raises:
        RequestError: a value is out of range.
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
    """Return the maximum number of rows of a request that `default` steers."""
    steering = request.steering(default)
    return 1 + len(row_weights(request.preference, steering.strength, steering.focus))


class Traffic:
    """Counts the requests being answered. Use it only in the event loop's thread.

    Args:
        rows: maximum rows of the engine, which takes requests in order.
        limits: sets how many may wait.
    """

    def __init__(self, rows: int, limits: Limits) -> None:
        self.state: State = "loading"
        self.rows = rows
        self._limits = limits
        self._entered: dict[object, int] = {}
        self._seconds = 1.0  # of a typical request

    def __len__(self) -> int:
        return len(self._entered)

    @property
    def waiting(self) -> int:
        """The number of requests without a place in the batch."""
        taken = 0
        for place, rows in enumerate(self._entered.values()):
            if taken and taken + rows > self.rows:
                return len(self._entered) - place
            taken += rows
        return 0

    def enter(self, rows: int) -> object:
        """Add a request to the queue; return the ticket for `leave`.

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
                f"The queue is full: {waiting} requests wait, the limit is {self._limits.queue}. "
                "Retry later.",
                code="queue_full",
                retry_after=min(60.0, self._seconds * (waiting + 1) / max(1, len(self) - waiting)),
            )
        return ticket

    def leave(self, ticket: object, seconds: float) -> None:
        """Remove a request, which took `seconds`."""
        if self._entered.pop(ticket, None) is not None:
            self._seconds += 0.1 * (seconds - self._seconds)
