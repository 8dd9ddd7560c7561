"""`GGUFTokenizer`: tokenises with llama.cpp by a GGUF file's vocabulary.

Transformers renders the chat templates, so prompts are the same text on every backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from transformers import BatchEncoding, PreTrainedTokenizerBase

from amulet.backends.llamacpp.model import GGUFModel

if TYPE_CHECKING:
    from llguidance import LLTokenizer

UNKNOWN, CONTROL, USER_DEFINED = 1, 8, 16  # bits of llama_token_attr
SENTENCEPIECE = 1  # of llama_vocab_type
NONE = -1  # id of a token that is not in the vocabulary
NAMED = ("bos", "eos", "sep", "pad")


class GGUFTokenizer(PreTrainedTokenizerBase):
    """A tokenizer with the methods that prompts and answers use; no padding, no tensors.

    Args:
        model: the model whose vocabulary, special tokens and chat templates are used.
    """

    is_fast = False

    def __init__(self, model: GGUFModel) -> None:
        self.model = model
        templates = model.chat_templates
        named = {
            f"{name}_token": model.token(token_id)
            for name in NAMED
            if (token_id := getattr(model.lib, f"llama_vocab_{name}")(model.vocab)) != NONE
        }
        only = templates["default"] if list(templates) == ["default"] else templates or None
        super().__init__(  # type: ignore[no-untyped-call]
            name_or_path=model.name, chat_template=only, model_max_length=model.window, **named
        )
        kind = model.lib.llama_vocab_type(model.vocab)
        prefix = model.metadata.get("tokenizer.ggml.add_space_prefix", "true")
        self._drops_first_space = kind == SENTENCEPIECE and prefix == "true"
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def __len__(self) -> int:
        return self.model.vocab_size

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary, control tokens included."""
        return self.model.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by token, in the vocabulary's spelling."""
        return dict(self._ids)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {self.model.token(token_id): token_id for token_id in range(self.model.vocab_size)}

    @cached_property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are found in a text before it is split; control tokens are special."""
        return {
            token_id: AddedToken(
                self._piece(token_id, True).decode("utf-8", "replace"),
                special=bool(bits & (CONTROL | UNKNOWN)),
                normalized=False,
            )
            for token_id, bits in enumerate(self.model.attributes())
            if bits & (CONTROL | UNKNOWN | USER_DEFINED)
        }

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or those of several; None for an unknown token."""
        if isinstance(tokens, str):
            return self._ids.get(tokens)
        return [self._ids.get(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id, or those of several, in the vocabulary's spelling."""
        if isinstance(ids, int):
            return self.model.token(ids) if 0 <= ids < len(self) else None
        silent = self.added_tokens_decoder if skip_special_tokens else {}
        return [
            self.convert_ids_to_tokens(int(i))
            for i in ids
            if not (int(i) in silent and silent[int(i)].special)
        ]

    def encode(self, text: Any, text_pair: None = None, add_special_tokens: bool = True,
               split_special_tokens: bool = False, **options: Any) -> list[int]:  # fmt: skip
        """Return the ids of a text.

        Args:
            text: any text.
            text_pair: None.
            add_special_tokens: add the vocabulary's tokens for the start and end, such as BOS.
            split_special_tokens: treat the names of control tokens in the text as plain text.
            options: `verbose`, which is ignored.

        Raises:
            TypeError: another option is given.
        """
        _refuse({**options, "text_pair": text_pair})
        return self.model.tokenize(
            str(text), special=add_special_tokens, parse=not split_special_tokens
        )

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> BatchEncoding:
        """Return `input_ids` and `attention_mask` of one text or several; see `encode`."""
        if isinstance(text, str):
            ids: Any = self.encode(text, None, add_special_tokens, **options)
            mask: Any = [1] * len(ids)
        else:
            ids = [self.encode(each, None, add_special_tokens, **options) for each in text]
            mask = [[1] * len(each) for each in ids]
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """Return the text of ids, with U+FFFD for invalid bytes; spaces are not cleaned up.

        Args:
            token_ids: an id, several, or a tensor.
            skip_special_tokens: leave control tokens out.
            options: `clean_up_tokenization_spaces`, which is ignored.
        """
        ids: Iterable[Any] = (token_ids,) if isinstance(token_ids, int) else token_ids
        raw = b"".join(self._piece(int(i), not skip_special_tokens) for i in ids)
        text = raw.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._drops_first_space else text

    def _piece(self, token_id: int, special: bool) -> bytes:
        key = token_id, special
        if (known := self._pieces.get(key)) is None:
            inside = 0 <= token_id < len(self)  # llama.cpp aborts the process for other ids
            known = self._pieces[key] = self.model.piece(token_id, special) if inside else b""
        return known

    def to_llguidance(self, end_ids: Sequence[int]) -> LLTokenizer:
        """Return the vocabulary in llguidance's format, for grammars.

        Args:
            end_ids: ids that end an answer.
        """
        import llguidance

        make: Any = llguidance.LLTokenizer
        lib, added = self.model.lib, self.added_tokens_decoder
        tokens = []
        for token_id in range(len(self)):
            token = added.get(token_id)
            raw = self._piece(token_id, True)
            # A byte that no text has marks tokens that a grammar names, as opposed to spells.
            marked = token is not None and (token.special or raw[:1] + raw[-1:] == b"<>")
            tokens.append(b"\xff" + raw if marked else raw)
        function = ctypes.cast(lib.llama_tokenize, ctypes.c_void_p).value
        made: LLTokenizer = make.from_llamacpp(
            tokens=tokens,
            vocab_ptr=self.model.vocab,
            tokenize_fptr=function,
            eos_token=list(end_ids),
        )
        return made


def _refuse(options: dict[str, Any]) -> None:
    given = {name for name, value in options.items() if value not in (None, False)} - {"verbose"}
    if given:
        raise TypeError(
            f"A GGUF file's tokenizer takes no {', '.join(sorted(given))}: it returns lists of ids."
        )
