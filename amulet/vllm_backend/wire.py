"""The data that frontend, scheduler and logits processor exchange in vLLM's `extra_args`.

A steered request has a `Pair` under `PAIR`. The scheduler makes rows of it, whose sampling
parameters have a `Row` under `ROW`. Both are plain JSON, because they cross processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amulet.errors import RequestError

PAIR = "amulet"
ROW = "amulet_row"


@dataclass(frozen=True)
class Pair:
    """How one request is steered; its own prompt is the first preferred prompt.

    Attributes:
        prompts: token ids of the further rows: the other preferred prompts, with focus the prompt
            of the preferences alone, then the base prompt.
        weights: w_i of `r + Σ w_i·(p_i − r)`, one per preferred row.
        floor: plausibility floor in [0, 1]; 0 is off.
        loop_guard: see `Steering`; 0 is off.
        spans: pairs of token ids between which only the base row decides, as in thinking and tool
            calls, which machines read.
        inside: the prompts end inside such a span, or before a header.
        heads: token ids of the headers of messages for the reader, where an answer is messages with
            headers (gpt-oss); only inside such messages all rows decide.
        ends: token ids behind which a header follows.
    """

    prompts: list[list[int]]
    weights: list[float]
    floor: float = 0.0
    loop_guard: int = 0
    spans: list[list[int]] | None = None
    inside: bool = False
    heads: list[list[int]] | None = None
    ends: list[int] | None = None

    def args(self) -> dict[str, Any]:
        """Return the entry for `extra_args`."""
        return {PAIR: asdict(self)}

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> Pair | None:
        """Return the request's pair, or None for a plain request.

        Raises:
            RequestError: the entry is not a pair.
        """
        given = (extra_args or {}).get(PAIR)
        if given is None:
            return None
        try:
            pair = cls(**given)
            is_right = (
                len(pair.prompts) == len(pair.weights) > 0
                and all(_is_prompt(prompt) for prompt in pair.prompts)
                and all(math.isfinite(weight) for weight in pair.weights)
                and any(pair.weights)
                and 0.0 <= pair.floor <= 1.0
                and type(pair.loop_guard) is int
                and pair.loop_guard >= 0
                and all(len(span) == 2 for span in pair.spans or ())
                and all(map(_is_prompt, pair.heads or ()))
            )
        except TypeError:
            is_right = False
        if not is_right:
            raise RequestError(
                f"extra_args[{PAIR!r}] is not a pair: give the request a `preference` instead."
            )
        return pair


def _is_prompt(ids: Any) -> bool:
    return isinstance(ids, Sequence) and len(ids) > 0 and all(type(token) is int for token in ids)


@dataclass(frozen=True)
class Row:
    """One row of a steered request, for the logits processor.

    Attributes:
        request: id of the request, the same for all its rows.
        number: the row's index; the last one is the base row.
        count: the number of rows of the request.
        pair: how the rows are combined, without the prompts.
        temperature, top_k, top_p, min_p: how the token is chosen; 0 is greedy.
        penalties: repetition, presence and frequency penalty.
        seed: the seed of the draws.
        is_seeded: the request set the seed; otherwise any draw is valid.
    """

    request: str
    number: int
    count: int
    pair: Pair
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    penalties: tuple[float, float, float]
    seed: int
    is_seeded: bool

    def args(self) -> dict[str, Any]:
        """Return the entry for `extra_args`."""
        return {ROW: asdict(self)}

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> Row | None:
        """Return the row, or None if the engine request is not one."""
        given = (extra_args or {}).get(ROW)
        if given is None:
            return None
        return cls(**{**given, "pair": Pair(**given["pair"])})
