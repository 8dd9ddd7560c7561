"""`Generation`: one answer being decoded, its options and its tokens so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from amulet.decoding.loop_guard import Repeats
from amulet.decoding.mixture import TokenScores
from amulet.decoding.prompt_lookup import Draft
from amulet.decoding.sampling import Sampling
from amulet.images import PromptImage

if TYPE_CHECKING:
    from transformers import LogitsProcessor


@dataclass(eq=False)
class Generation:
    """One answer being decoded.

    It owns rows of the batch: one row if plain; if steered, a preferred row per preference, the row
    of focus and a base row.

    Args:
        prompts: ids of each of its rows: the preferred prompts, focus, then the base prompt. A
            single prompt is decoded without steering. Negative ids are columns of `images`.
        plain: ids of the prompt without preferences, for the repetition penalty and processors.
            If None, processors get the first of `prompts` and the penalty the last.
        weights: w_i of `r + Σ w_i·(p_i − r)`, one per row except the base row. They may be changed
            between steps; if all are zero, the base row alone decides.
        floor: plausibility floor in [0, 1]: tokens below this share of the likeliest preferred
            token's probability are excluded; 0 is off.
        loop_guard: how many of its own tokens the answer may repeat freely; 0 is off.
        max_new_tokens: the answer's limit in tokens.
        sampling: how tokens are chosen.
        seed: for sampling; None draws one.
        end_ids: ids that end the answer.
        on_token: called with each decoded id except an ending one; True ends the answer.
        allowed: called before each choice; returns a bool mask `[vocab]` of permitted ids, or None.
        processors: Transformers logits processors, applied to the combined scores.
        trace: collect `TokenScores`, with `top_logprobs` alternatives each.
        images: those in the prompts; dropped after the prefill.
    """

    prompts: Sequence[list[int]]
    weights: Sequence[float] = ()
    floor: float = 0.0
    loop_guard: int = 0
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    end_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] | None = None
    allowed: Callable[[], torch.Tensor | None] | None = None
    processors: Sequence[LogitsProcessor] = ()
    trace: bool = False
    top_logprobs: int = 0
    plain: list[int] | None = None
    images: Sequence[PromptImage] = ()

    token_ids: list[int] = field(default_factory=list, init=False)
    scores: list[TokenScores] = field(default_factory=list, init=False)
    finish_reason: str | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)
    # Nanoseconds of `time.time_ns`: it left the queue, and got its first and its last token.
    admitted_at: int = field(default=0, init=False, repr=False)
    first_at: int = field(default=0, init=False, repr=False)
    last_at: int = field(default=0, init=False, repr=False)
    cached_tokens: int = field(default=0, init=False)  # of `prompts[0]`: copied, not computed
    generator: torch.Generator | None = field(default=None, init=False, repr=False)
    seen: torch.Tensor | None = field(default=None, init=False, repr=False)
    draft: Draft | None = field(default=None, init=False, repr=False)
    repeats: Repeats | None = field(default=None, init=False, repr=False)
    context: Context = field(default_factory=copy_context, init=False, repr=False)  # of its caller
    # `weights_state` when its prompts were computed; the engine compares by identity.
    computed_with: Any = field(default=None, init=False, repr=False)

    @property
    def done(self) -> bool:
        """Whether it has ended; it takes part in no further step."""
        return self.finish_reason is not None or self.error is not None

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it has ended already."""
        if not self.done:
            self.error = error
