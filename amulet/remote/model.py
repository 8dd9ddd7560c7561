"""Stand-ins for a remote model's tokenizer and weights, for the integrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class RemoteTokenizer:
    """Stands for the tokenizer of a remote model: has its template, and ids from the server.

    Args:
        tokenize: asks the server.
        chat_template: the model's template, or None if it has none.
    """

    def __init__(
        self, tokenize: Callable[[dict[str, Any]], list[int]], chat_template: str | None
    ) -> None:
        self.chat_template = chat_template
        self._tokenize = tokenize

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        return self._tokenize({"prompt": text, "add_special_tokens": add_special_tokens})


class RemoteModel:
    """Stands for the weights of a remote model, by which caches of answers are keyed.

    Args:
        fingerprint: the server's fingerprint of its model.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield one parameter without values, named by the fingerprint."""
        yield self._fingerprint, torch.empty(0, device="meta")
