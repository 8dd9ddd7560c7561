"""The choice of the next token, for all generations at once: combine, cut, sample, append."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amulet.generation import Generation
from amulet.mixture import Mixture, take_rows
from amulet.sampling import choose, penalise


def choose_tokens(
    generations: Sequence[Generation], logits: torch.Tensor, order: Sequence[int]
) -> tuple[list[int], Mixture]:
    """Return one token id per generation, and the distributions that they were chosen from.

    A grammar or processor that fails ends its own generation only.

    Args:
        generations: whose tokens are chosen.
        logits: `[rows, vocab]`.
        order: the rows of the first generation, then those of the second, ...
    """
    logits = take_rows(logits, order)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mix = Mixture(
        logits,
        [generation.weights for generation in generations],
        [len(generation.prompts) for generation in generations],
        [bool(g.processors) or g.seen is not None for g in generations],
    )
    mix.cut(
        [generation.floor for generation in generations],
        [_permitted(generation, logits) for generation in generations],
    )
    scores = mix.scores
    if any(generation.trace for generation in generations):
        scores = scores.clone()  # the trace shows them as they are before the penalties
    for i, generation in enumerate(generations):
        if generation.error is None:
            _process(generation, scores[i])
    chosen = choose(
        scores,
        [generation.sampling for generation in generations],
        [generation.generator for generation in generations],
    )
    token_ids: list[int] = chosen.tolist()  # the step's one transfer to the host
    return token_ids, mix


def _permitted(generation: Generation, logits: torch.Tensor) -> torch.Tensor | None:
    """Ask a generation's grammar for the permitted ids; a failure is that generation's."""
    if generation.allowed is None:
        return None
    try:
        mask = generation.allowed()
    except Exception as error:
        generation.error = error
        return None
    return None if mask is None else mask.to(logits.device)


def _process(generation: Generation, scores: torch.Tensor) -> None:
    """Apply a generation's own processors and repetition penalty to its scores, in place."""
    try:
        if generation.seen is not None:
            penalty = generation.sampling.repetition_penalty
            scores.copy_(penalise(scores, generation.seen, penalty))
        if generation.processors:
            ids = torch.tensor([generation.prompts[0] + generation.token_ids], device=scores.device)
            for processor in generation.processors:
                scores.copy_(processor(ids, scores[None].clone())[0])
    except Exception as error:
        generation.error = error


def append_token(generation: Generation, token_id: int) -> None:
    """Append a decoded id, hand it on, and end the answer where it is to end."""
    generation.token_ids.append(token_id)
    if generation.seen is not None:
        generation.seen[token_id] = True
    if token_id in generation.end_ids:
        generation.finish_reason = "stop"
        return
    try:
        stopped = generation.on_token is not None and generation.on_token(token_id)
    except Exception as error:
        generation.error = error
        return
    if generation.done:  # cancelled meanwhile
        return
    if stopped:
        generation.finish_reason = "stop"
    elif len(generation.token_ids) >= generation.max_new_tokens:
        generation.finish_reason = "length"
