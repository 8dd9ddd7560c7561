"""Log-probabilities of a given answer: under each preferred row, the base row, and steered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from amulet.cache import cache_argument
from amulet.errors import EvaluationError
from amulet.gain import steer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amulet import Amulet, Request


@dataclass(frozen=True)
class Scores:
    """What the rows of one request think of an answer of T tokens.

    Attributes:
        token_ids: the answer's, `[T]`.
        rows: log-probabilities of all tokens at each place, `[rows, T, vocab]`, float32: the
            preferred rows, then the base row. A request without preference has the base row alone.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor

    @property
    def preferred(self) -> torch.Tensor:
        """Of the answer's tokens in each preferred row, `[preferences, T]`."""
        return self._gathered(self.rows[:-1])

    @property
    def base(self) -> torch.Tensor:
        """Of the answer's tokens without any preference, `[T]`."""
        return self._gathered(self.rows[-1])

    def steered(self, strength: float, floor: float = 0.0) -> torch.Tensor:
        """Of the answer's tokens as steered by one preference, `[T]`; −inf below the floor.

        Args:
            strength: g of `log π ∝ p + g·(p − r)`.
            floor: share of the likeliest preferred token's probability, 0 (off) to 1.

        Raises:
            EvaluationError: the request had none or several preferences.
        """
        if len(self.rows) != 2:
            raise EvaluationError(
                f"steered scores are for one preference; this request has {len(self.rows) - 1}."
            )
        preferred, base = self.rows
        scores = steer(preferred, base, torch.tensor(strength))
        if floor > 0:
            least = preferred.amax(dim=-1, keepdim=True) + torch.tensor(floor).log()
            scores = scores.masked_fill(preferred < least, float("-inf"))
        return self._gathered(scores.log_softmax(dim=-1))

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        index = self.token_ids.expand(*rows.shape[:-1])[..., None]
        return rows.gather(-1, index)[..., 0]


@torch.inference_mode()
def answer_log_probabilities(amulet: Amulet, request: Request, token_ids: Sequence[int]) -> Scores:
    """Score an answer that was written, or could have been, token by token as if decoded.

    One forward pass per row, of its prompt and the answer.

    Args:
        amulet: the model.
        request: the chat and its preferences; strength and sampling don't matter.
        token_ids: the answer.

    Raises:
        EvaluationError: the answer is empty.
        RequestError: the request is not valid.
    """
    if not token_ids:
        raise EvaluationError("An empty answer has no log-probability: leave it out.")
    # Strength 1 and a trace: every row is there, whatever the request's own strength.
    every_row = request.model_copy(update={"strength": 1.0, "trace": True})
    with amulet.start(every_row) as stream:
        prompts = stream.generation.prompts
    answer = list(token_ids)
    rows = [_row(amulet, prompt, answer) for prompt in prompts]
    return Scores(torch.tensor(answer, device=rows[0].device), torch.stack(rows))


def _row(amulet: Amulet, prompt: list[int], answer: list[int]) -> torch.Tensor:
    model = amulet.model
    ids = torch.tensor([prompt + answer], device=model.device)
    options = {} if cache_argument(model) == "cache" else {"use_cache": False}
    logits: torch.Tensor = model(ids, logits_to_keep=len(answer) + 1, **options).logits[0]
    kept = logits[-len(answer) - 1 : -1]  # a model may not know `logits_to_keep`
    return kept.to(torch.float32).log_softmax(dim=-1)
