"""What integrations ask of a loaded model's tokenizer and weights, answered for a remote one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class RemoteTokenizer:
    """Stands for the tokenizer of a remote model: its template, and ids by the server.

    Args:
        tokenize: asks the server.
        chat_template: the model's, None where it has none.
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
    """Stands for the weights of a remote model: caches of answers are keyed by what they are.

    Args:
        fingerprint: the server's for its model.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield one parameter without values, named by the fingerprint."""
        yield self._fingerprint, torch.empty(0, device="meta")
