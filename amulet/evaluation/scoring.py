"""Computes log-probabilities of given answers: by preferred rows, the base row, and steered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from amulet.backends.llamacpp.backend import LlamaBackend
from amulet.backends.llamacpp.model import GGUFModel
from amulet.backends.transformers.support import cache_argument, restarts, why_not_in_rows
from amulet.decoding.loop_guard import Repeats
from amulet.decoding.mixture import Mixture
from amulet.errors import EvaluationError
from amulet.evaluation.jobs import with_every_row
from amulet.preference import Preference, row_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amulet import Amulet, Request

TOKENS = 2048  # per forward pass with padding; more only takes memory on a CPU

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Scores:
    """The log-probabilities of an answer of T tokens in the rows of one request.

    Attributes:
        token_ids: the answer's token ids, `[T]`.
        rows: log-probabilities of all tokens at each position, `[rows, T, vocab]`, float32: the
            preferred rows, the focus row if the request has focus, then the base row. A request
            without preference has only the base row.
        preferences: the preferences of the preferred rows, in order.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor
    preferences: tuple[Preference, ...] = ()

    @property
    def preferred(self) -> torch.Tensor:
        """Log-probabilities of the answer's tokens in each preferred row, `[preferences, T]`."""
        return self._gathered(self.rows[: len(self.preferences)])

    @property
    def base(self) -> torch.Tensor:
        """Log-probabilities of the answer's tokens in the base row, `[T]`."""
        return self._gathered(self.rows[-1])

    @property
    def alone(self) -> torch.Tensor:
        """Of the answer's tokens behind the preferences alone, `[T]`; the request has focus."""
        return self._gathered(self.rows[len(self.preferences)])

    def steered(
        self, strength: float, floor: float = 0.0, focus: float = 0.0, loop_guard: int = 0
    ) -> torch.Tensor:
        """Return steered log-probabilities of the answer's tokens, `[T]`; −inf below the floor.

        Args:
            strength, floor, focus, loop_guard: see `Steering`.

        Raises:
            EvaluationError: the request had no preference, or no focus although `focus` is given.
        """
        if not self.preferences:
            raise EvaluationError("steered scores need a preference; this request has none.")
        count, places, vocab = self.rows.shape
        weights = row_weights(self.preferences, strength, focus)
        if len(weights) >= count:
            raise EvaluationError("steered scores with focus need a request that has it.")
        weights += [0.0] * (count - 1 - len(weights))
        # The decoder's own step, with the answer's positions in place of generations.
        mixture = Mixture(
            self.rows.transpose(0, 1).reshape(places * count, vocab),
            [weights] * places,
            [count] * places,
        )
        if loop_guard and strength > 0:
            answer, repeats = self.token_ids.tolist(), Repeats(loop_guard)
            mixture.lower([repeats.costs(answer[:place]) for place in range(places)])
        mixture.cut([floor] * places, [None] * places)
        return self._gathered(mixture.scores.log_softmax(dim=-1))

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        index = self.token_ids.expand(*rows.shape[:-1])[..., None]
        return rows.gather(-1, index)[..., 0]


def answer_log_probabilities(amulet: Amulet, request: Request, token_ids: Sequence[int]) -> Scores:
    """Score any given answer token by token, as if it were decoded.

    Args:
        amulet: the model.
        request: the chat and its preferences; strength and sampling don't matter.
        token_ids: the answer.

    Raises:
        EvaluationError: the answer is empty, or too long for the context window.
        RequestError: the request is invalid.
    """
    return score_answers(amulet, [(request, token_ids)], lambda scores: scores)[0]


@torch.inference_mode()
def score_answers(
    amulet: Amulet,
    items: Sequence[tuple[Request, Sequence[int]]],
    take: Callable[[Scores], Taken],
    tell: Callable[[int, int], None] | None = None,
) -> list[Taken]:
    """Score many answers, with answers of similar length in one forward pass.

    Args:
        amulet: the model.
        items: requests and their answers' token ids; see `answer_log_probabilities`.
        take: extracts the result from an answer's scores. These have the whole vocabulary at every
            position, 25 MB for a row of 128 tokens of SmolLM2, so extract numbers and drop the
            rest.
        tell: called with (answers scored, answers in all).

    Returns:
        The extracted results, in the order of the items.

    Raises:
        EvaluationError: an answer is empty, or too long for the context window.
        RequestError: a request is invalid.
    """
    rows = [_rows_of(amulet, request, list(token_ids)) for request, token_ids in items]
    taken: dict[int, Taken] = {}
    for batch in _batches(rows):
        for i, scores in zip(batch, _score(amulet.model, [rows[i] for i in batch]), strict=True):
            taken[i] = take(scores)
        if tell is not None:
            tell(len(taken), len(rows))
    return [taken[i] for i in range(len(rows))]


@dataclass(frozen=True)
class _Rows:
    """One item's rows: their prompts, the base row last, and the answer that follows each."""

    prompts: Sequence[list[int]]
    preferences: tuple[Preference, ...]
    answer: list[int]

    @property
    def width(self) -> int:
        return max(map(len, self.prompts)) + len(self.answer)


def rows_of(amulet: Amulet, request: Request) -> tuple[Sequence[list[int]], tuple[Preference, ...]]:
    """Return the prompts of all rows, the base row last, and the preferences.

    Raises:
        EvaluationError: the request has images.
    """
    with amulet.start(with_every_row(request)) as stream:
        prompts = stream.generation.prompts
    if min(map(min, prompts)) < 0:  # a column of an image
        raise EvaluationError(
            "The messages have an image: answers about images can't be scored. Leave them out."
        )
    return prompts, request.preference


@torch.inference_mode()
def score_continuations(
    amulet: Amulet, prompt: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Return the log-probabilities `[T, vocab]` for each of several answers to one prompt.

    The prompt goes through the model once, which pays off for short answers; but with each answer
    where several tokens can't follow it (Mamba).

    Args:
        amulet: the model.
        prompt: token ids.
        answers: token ids of each answer; none is empty.
    """
    model = amulet.model
    if isinstance(model, GGUFModel):
        return _continued(model, prompt, answers)
    if why_not_in_rows(model) or restarts(model):
        whole = [torch.tensor([[*prompt, *answer[:-1]]], device=model.device) for answer in answers]
        logits = (model(ids, **_without_cache(model)).logits for ids in whole)
        return [one[0, len(prompt) - 1 :].float().log_softmax(dim=-1) for one in logits]
    name = cache_argument(model)
    out = model(torch.tensor([list(prompt)], device=model.device), use_cache=True)
    first = out.logits[0, -1:].to(torch.float32)  # [1, vocab]
    width = max(map(len, answers)) - 1  # an answer's last token predicts nothing
    if not width:
        return [first.log_softmax(dim=-1)] * len(answers)
    cache = out.cache if name == "cache" else out.past_key_values
    cache.batch_repeat_interleave(len(answers))
    padded = [[*answer[:-1], *[0] * (width + 1 - len(answer))] for answer in answers]
    ids = torch.tensor(padded, device=model.device)
    rest = model(ids, **{name: cache}).logits.to(torch.float32)  # [answers, width, vocab]
    return [
        torch.cat([first, rest[i, : len(answer) - 1]]).log_softmax(dim=-1)
        for i, answer in enumerate(answers)
    ]


def _continued(
    model: GGUFModel, prompt: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Return the same by llama.cpp, in a context of its own beside the decoder's."""
    backend = LlamaBackend(model)
    try:
        backend.reserve(2, len(prompt) + max(map(len, answers)))
        first = backend.forward([prompt], [0], 0, [len(prompt) - 1])[0]
        found = []
        for answer in answers:
            logits = first
            if given := answer[:-1]:  # an answer's last token predicts nothing
                backend.copy_row(0, 1, len(prompt))
                rest = backend.forward([given], [len(prompt)], 1, range(len(given)))[0]
                logits = torch.cat([first, rest])
            found.append(logits.log_softmax(dim=-1))
        return found
    finally:
        backend.clear()


def _without_cache(model: PreTrainedModel) -> dict[str, Any]:
    return {} if cache_argument(model) == "cache" else {"use_cache": False}


def _rows_of(amulet: Amulet, request: Request, answer: list[int]) -> _Rows:
    if not answer:
        raise EvaluationError("An empty answer has no log-probability: leave it out.")
    rows = _Rows(*rows_of(amulet, request), answer)
    if amulet.window is not None and rows.width > amulet.window:
        raise EvaluationError(
            f"Prompt and answer have {rows.width} tokens and the model's context window "
            f"{amulet.window}: shorten the answer, which has {len(answer)}, or leave it out."
        )
    return rows


def _batches(rows: Sequence[_Rows]) -> Iterator[list[int]]:
    """Yield indices of items to score together, by length: up to `TOKENS`, at least one."""
    batch: list[int] = []
    count = 0
    for i in sorted(range(len(rows)), key=lambda i: rows[i].width):
        count += len(rows[i].prompts)
        if batch and count * rows[i].width > TOKENS:
            yield batch
            batch, count = [], len(rows[i].prompts)
        batch.append(i)
    if batch:
        yield batch


def _score(model: PreTrainedModel | GGUFModel, items: Sequence[_Rows]) -> Iterator[Scores]:
    """Yield the scores of each item; Transformers takes all their rows in one forward pass."""
    if isinstance(model, GGUFModel):
        for item in items:
            rows = [_continued(model, prompt, [item.answer])[0] for prompt in item.prompts]
            yield Scores(torch.tensor(item.answer), torch.stack(rows), item.preferences)
        return
    # An answer's last token predicts nothing that is needed.
    ids = [prompt + item.answer[:-1] for item in items for prompt in item.prompts]
    starts = [len(prompt) - 1 for item in items for prompt in item.prompts]
    width = max(map(len, ids))
    padded = [row + [0] * (width - len(row)) for row in ids]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in ids]
    options = _without_cache(model)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = width - min(starts)
    logits: torch.Tensor = model(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        **options,
    ).logits
    dropped = width - logits.shape[1]
    row = 0
    for item in items:
        own = []
        for _ in item.prompts:
            first = starts[row] - dropped
            own.append(logits[row, first : first + len(item.answer)].to(torch.float32))
            row += 1
        answer = torch.tensor(item.answer, device=logits.device)
        yield Scores(answer, torch.stack(own).log_softmax(dim=-1), item.preferences)
