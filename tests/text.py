"""The detokenizer and stop strings together, as an answer joins them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from amulet.output.detokenizer import Detokenizer
from amulet.output.stop_sequences import StopStrings, special_letters


class TextStream:
    """The text of one answer, token by token, cut at the first stop string.

    That is the one that is complete first; of two that are complete at the same character, the one
    that starts earlier. What is released depends on the text alone, not on where tokens split it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self.text = ""
        self._detokenizer = Detokenizer(tokenizer, context, skip_special_tokens)
        letters = special_letters(tokenizer, stop) if skip_special_tokens else {}
        self._letters = {token_id: letter for token_id, (_, letter) in letters.items()}
        self._stops = StopStrings(stop, dict(letters.values()))

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that can be released now, "" while held back."""
        if self._stops.found is not None:
            return ""
        letter = self._letters.get(token_id)
        text = self._detokenizer.finish() + letter if letter else self._detokenizer.push(token_id)
        return self._release(self._stops.push(text))

    def finish(self) -> str:
        """Return what was held back, once decoding has ended; "" after a stop string."""
        if self._stops.found is not None:
            return ""
        return self._release(self._stops.push(self._detokenizer.finish(), ended=True))

    def _release(self, text: str) -> str:
        self.text += text
        return text
