"""Decides whether a token is steered: only text that a person reads is.

Thinking, tool calls and the fixed parts of a grammar are decoded with the base row alone. Which
section a token is in, the scanner says (`sections.py`); this module reads no text.
"""

from __future__ import annotations

import torch

from amulet.decoding.generation import Generation
from amulet.grammar import Grammar, Matcher
from amulet.output.sections import Section
from amulet.request import Request

FREE = 0.5
"""Under a grammar, text is free where at least this share of the vocabulary is permitted."""


def is_answer_steered(request: Request, grammar: Grammar | None) -> bool:
    """Tell whether any token of an answer can be steered.

    Args:
        request: with or without a preference.
        grammar: the answer's: the request's own, or one that forces tool calls; None without.
    """
    return grammar is None or (grammar is request.grammar and request.steer_grammar)


def is_token_steered(section: Section, permitted: torch.Tensor | None = None) -> bool:
    """Tell whether the next token is steered.

    Args:
        section: the section it belongs to.
        permitted: bool `[vocab]`, what the grammar allows; None without a grammar.
    """
    return section == "text" and (permitted is None or bool(permitted.float().mean() >= FREE))


class Policy:
    """Sets, before each token, whether a generation is steered and what its grammar permits.

    It writes `generation.weights` and `floor`: as they were given where the next token is steered,
    0 elsewhere.

    Args:
        generation: with the weights and the floor of a steered token.
        matcher: follows the grammar of what comes after the reasoning, if there is one.
    """

    def __init__(self, generation: Generation, matcher: Matcher | None) -> None:
        self._generation = generation
        self._weights = tuple(generation.weights)
        self._floor = generation.floor
        self._matcher = matcher
        self._permitted: torch.Tensor | None = None
        if matcher is not None:
            generation.allowed = lambda: self._permitted

    def took(self, token_id: int, section: Section) -> bool:
        """Advance the grammar by a token chosen in a section; return whether it is complete."""
        if self._matcher is None or section == "reasoning":
            return False
        self._matcher.consume(token_id)
        return self._matcher.complete

    def prepare(self, section: Section) -> None:
        """Set how the next token is chosen, in the given section."""
        if self._matcher is not None:
            self._permitted = self._matcher.allowed()
            if section == "reasoning":  # any token except those that end the answer
                self._permitted = torch.ones_like(self._permitted)
                self._permitted[list(self._generation.end_ids)] = False
        permitted = self._permitted if any(self._weights) else None  # it costs a sum over the ids
        steered = is_token_steered(section, permitted)
        self._generation.weights = self._weights if steered else (0.0,) * len(self._weights)
        self._generation.floor = self._floor if steered else 0.0
