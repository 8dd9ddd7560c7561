"""The guards, which measure harm to the answers: likelihood, repetition, length, meaning.

Each guard is a value per answer, so that a report can compare methods by question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amulet import minilm
from amulet.errors import EvaluationError
from amulet.evaluation.jobs import messages_of
from amulet.evaluation.rules import words

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from amulet.evaluation.judging import JudgeOptions
    from amulet.evaluation.run import Answer, Run

TEXTS = 64  # embedded at once

# Repetition is measured twice: in words alone, because the numbers of a list would separate its
# repeated items; and with numbers, emojis and punctuation that occurs four or more times in a row,
# as in "!!!!!!" or a list of dashes only. Other punctuation is ignored, because a good list repeats
# its marks.
PLAIN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
UNIT = re.compile(
    r"[^\W_]+(?:['’][^\W_]+)*|([^\w\s])(?=(?:\s*\1){3})|[^\w\s!-/:-@\[-`{-~\u2000-\u206f«»¿¡·\ufe0f]"
)


def distinct_3(text: str) -> float:
    """Return the share of runs of three words that are not repeats, 0 to 1 (1: no repeats).

    Runs of words, numbers, emojis and repeated punctuation are used if that share is smaller.
    """
    return min(_distinct_3(_read(text, PLAIN)), _distinct_3(_read(text, UNIT)))


def _distinct_3(found: list[str]) -> float:
    runs = list(zip(found, found[1:], found[2:], strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def longest_repeat(text: str) -> int:
    """Return the length in words of the longest run that occurs more than once.

    Runs of words, numbers, emojis and repeated punctuation are used if that length is larger.
    """
    return max(_longest_repeat(_read(text, PLAIN)), _longest_repeat(_read(text, UNIT)))


def _longest_repeat(found: list[str]) -> int:
    longest, before = 0, [0] * (len(found) + 1)
    for i in range(1, len(found) + 1):  # common suffixes of each pair of positions
        row = [0] * (len(found) + 1)
        for j in range(i + 1, len(found) + 1):
            if found[i - 1] == found[j - 1]:
                row[j] = before[j - 1] + 1
                longest = max(longest, min(row[j], j - i))  # the two must not overlap
        before = row
    return longest


def _read(text: str, unit: re.Pattern[str]) -> list[str]:
    return [match.group().lower() for match in unit.finditer(text)]


def similarities(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the cosine similarity of each pair of texts by MiniLM embeddings, −1 to 1.

    Raises:
        EvaluationError: MiniLM is neither installed nor available from the hub.
    """
    texts = sorted({text for pair in pairs for text in pair}, key=len)
    vectors: dict[str, torch.Tensor] = {}
    source = minilm.installed() or minilm.HUB_NAME
    for first in range(0, len(texts), TEXTS):
        batch = texts[first : first + TEXTS]
        try:
            found, _ = minilm.embed(batch, source)
        except OSError as error:
            raise EvaluationError(
                f"The guard `similarity` needs MiniLM: run `{minilm.INSTALL}`, or let "
                f"{minilm.HUB_NAME} be downloaded."
            ) from error
        vectors.update(zip(batch, found, strict=True))
    return [float(vectors[a] @ vectors[b]) for a, b in pairs]


def score_guards(
    run: Run, options: JudgeOptions, tell: Callable[[int, int], None] | None = None
) -> None:
    """Write the guards of every answer of a run that lacks them.

    `log_probability` is the mean over the answer's tokens under the plain model, in nats, which is
    usually stored with the answer. `similarity` is to the plain answer to the same question, and
    exists only in a run with the method base.

    Raises:
        EvaluationError: an answer's log-probability is missing and no model is given.
    """
    answers = run.answers()
    plain = {(a.set, a.index): a.answer for a in answers if a.method == "base"}
    done = run.scores("guards")
    left = [answer for answer in answers if answer.key not in done]
    total, count = len(answers), len(answers) - len(left)
    for first in range(0, len(left), TEXTS):
        batch = left[first : first + TEXTS]
        paired = [a for a in batch if (a.set, a.index) in plain and a.answer.strip()]
        cosines = dict(
            zip(
                [answer.key for answer in paired],
                similarities([(a.answer, plain[a.set, a.index] or " ") for a in paired]),
                strict=True,
            )
        )
        likelihoods = _log_probabilities(run, batch, options)
        for answer in batch:
            values = _values(answer)
            if answer.key in likelihoods:
                values["log_probability"] = likelihoods[answer.key]
            if answer.key in cosines:
                values["similarity"] = cosines[answer.key]
            run.append_scores("guards", answer.key, values)
        count += len(batch)
        if tell is not None:
            tell(count, total)


def _values(answer: Answer) -> dict[str, float]:
    values = {
        "distinct_3": distinct_3(answer.answer),
        "longest_repeat": float(longest_repeat(answer.answer)),
        "empty": float(not answer.answer.strip()),
        "cut": float(answer.finish_reason == "length"),
        "words": float(len(words(answer.answer))),
    }
    if answer.changed is not None:
        values["changed"] = answer.changed
    return values


def _log_probabilities(
    run: Run, answers: Sequence[Answer], options: JudgeOptions
) -> dict[str, float]:
    """Return each answer's stored value, or the model's, by key; none for empty answers."""
    found = {a.key: a.log_probability for a in answers if a.log_probability is not None}
    unknown = [answer for answer in answers if answer.key not in found and answer.token_ids]
    if not unknown:
        return found
    if options.amulet is None:
        raise EvaluationError(
            f"The answer {unknown[0].key} has no log-probability: give the model that "
            "decoded the run."
        )
    from amulet.evaluation.scoring import score_answers
    from amulet.request import Request

    prompt = str(run.meta.settings.get("system_prompt", ""))
    items = [(Request(messages=messages_of(a.question, prompt)), a.token_ids) for a in unknown]
    means = score_answers(options.amulet, items, lambda scores: float(scores.base.mean()))
    return found | {answer.key: mean for answer, mean in zip(unknown, means, strict=True)}
