"""Chooses the next token of all generations at once: combine, cut, sample, append."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from amulet.decoding.generation import Generation
from amulet.decoding.loop_guard import Repeats
from amulet.decoding.mixture import Mixture, take_rows
from amulet.decoding.sampling import NEVER, choose, penalise
from amulet.errors import DecodeError

MOST = 1e30  # the highest score: it stays finite when a temperature divides it


def choose_tokens(
    generations: Sequence[Generation], logits: torch.Tensor, order: Sequence[int]
) -> tuple[list[int], Mixture]:
    """Return one token id per generation, and the distributions they were chosen from.

    A failing grammar or processor ends only its own generation.

    Args:
        generations: the generations for which to choose tokens.
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
    mix.permit([_permitted(generation, logits) for generation in generations])
    mix.lower([_repeated(generation) for generation in generations])
    changed = [i for i, g in enumerate(generations) if g.processors or g.seen is not None]
    # The trace shows the scores as they are before the penalties.
    scores = mix.scores.clone() if changed else mix.scores
    moved: torch.Tensor | None = None
    for i in changed:
        if generations[i].error is None:
            by = _process(generations[i], scores[i])
            if by is not None:
                moved = torch.zeros_like(scores) if moved is None else moved
                moved[i] = by
    excluded = mix.cut([generation.floor for generation in generations], moved=moved)
    if scores is not mix.scores and excluded is not None:
        scores = scores.masked_fill(excluded, NEVER)
    chosen = choose(
        scores,
        [generation.sampling for generation in generations],
        [generation.generator for generation in generations],
    )
    # A row's maximum is finite if its logits are valid numbers; likewise for the scores.
    sound = [rows.amax(dim=-1).isfinite() for rows in (scores, logits)]
    told: list[int] = torch.cat([chosen, *sound]).tolist()  # the step's one transfer to the host
    count, first = len(generations), 2 * len(generations)
    for i, generation in enumerate(generations):
        last = first + len(generation.prompts)
        if generation.error is None and not (told[count + i] and all(told[first:last])):
            generation.error = _no_token(generation, scores[i], all(told[first:last]))
        first = last
    return told[:count], mix


def _no_token(generation: Generation, scores: torch.Tensor, model_is_sound: bool) -> DecodeError:
    """Return why no token can be chosen."""
    number = len(generation.token_ids) + 1
    if not model_is_sound:
        return DecodeError(
            f"The model's logits for token {number} of the answer are not finite numbers (NaN or "
            "infinity). In float16 large activations overflow: load the model with "
            'dtype="bfloat16" or "float32". Otherwise its weights are damaged.'
        )
    if bool((scores == NEVER).all()):
        return DecodeError(
            f"No token is left for token {number} of the answer: grammar and logits processors "
            "together forbid every one. Permit at least one token that the grammar permits."
        )
    return DecodeError(
        f"The scores for token {number} of the answer are not finite numbers: every logits "
        "processor must return numbers, or -inf for the tokens that it forbids."
    )


def _permitted(generation: Generation, logits: torch.Tensor) -> torch.Tensor | None:
    """Return the ids that a generation's grammar permits; an error ends only that generation."""
    if generation.allowed is None:
        return None
    try:
        mask = generation.allowed()
    except BaseException as error:
        generation.error = error
        return None
    return None if mask is None else mask.to(logits.device)


def _repeated(generation: Generation) -> dict[int, float]:
    """Return the loop guard's costs: by token id, the nats it loses for repeating the answer.

    Unsteered parts, such as a tool call, may repeat text and may be repeated.
    """
    if not generation.loop_guard or not any(generation.weights):
        generation.repeats = None
        return {}
    if generation.repeats is None:
        generation.repeats = Repeats(generation.loop_guard, start=len(generation.token_ids))
    return generation.repeats.costs(generation.token_ids)


def _process(generation: Generation, scores: torch.Tensor) -> torch.Tensor | None:
    """Apply a generation's repetition penalty and logits processors to its scores, in place.

    Returns:
        The values that the processors added to the scores, `[vocab]`; None without processors.
    """
    try:
        if generation.seen is not None:
            penalty = generation.sampling.repetition_penalty
            scores.copy_(penalise(scores, generation.seen, penalty))
        if not generation.processors:
            return None
        before, forbidden = scores.clone(), scores == NEVER
        prompt = generation.prompts[0] if generation.plain is None else generation.plain
        ids = torch.tensor([[*prompt, *generation.token_ids]], device=scores.device)
        for processor in generation.processors:
            made = generation.context.run(processor, ids, scores[None].clone())
            scores.copy_(made[0])
        # Infinity forces a token; the largest finite score keeps later arithmetic defined.
        scores.clamp_(max=MOST).masked_fill_(forbidden, NEVER)
        return (scores - before).masked_fill_(forbidden, NEVER)
    except BaseException as error:
        generation.error = error
        return None


def append_token(generation: Generation, token_id: int) -> None:
    """Append a decoded id, pass it to `on_token`, and end the answer if it is complete."""
    generation.token_ids.append(token_id)
    generation.last_at = time.time_ns()
    generation.first_at = generation.first_at or generation.last_at
    if generation.seen is not None:
        generation.seen[token_id] = True
    if token_id in generation.end_ids:
        generation.finish_reason = "stop"
        return
    try:
        stopped = generation.on_token is not None and generation.on_token(token_id)
    except BaseException as error:
        generation.error = error
        return
    if generation.done:  # cancelled during the call
        return
    if stopped:
        generation.finish_reason = "stop"
    elif len(generation.token_ids) >= generation.max_new_tokens:
        generation.finish_reason = "length"
