"""A copy of the caller's tokenizer that no other code can change.

A call of a fast tokenizer with `padding=` or `truncation=` sets both in its Rust part, for all
threads, until the next call. An encoding or decoding that overlaps it is padded or cut.
"""

from __future__ import annotations

import copy
import threading
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What callers change on a tokenizer in use, apart from its tokens.
WATCHED = (
    "chat_template",
    "response_template",
    "split_special_tokens",
    "add_bos_token",
    "add_eos_token",
)

_copies: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, PreTrainedTokenizerBase]]
_copies = WeakKeyDictionary()
_lock = threading.Lock()


def own_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return Amulet's copy of a fast tokenizer, without padding and truncation; made once.

    A changed chat template or response template, and added or special tokens, are seen: the next
    call returns a new copy. The vocabulary is shared, so a copy costs little. Other tokenizers are
    returned as they are: theirs are arguments of each call.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    state = _state(tokenizer)
    with _lock:
        known = _copies.get(tokenizer)
        if known is None or known[0] != state:
            known = _copies[tokenizer] = (state, _copied(tokenizer))
        return known[1]


def _state(tokenizer: PreTrainedTokenizerBase) -> Any:
    watched = [str(getattr(tokenizer, name, None)) for name in WATCHED]
    return len(tokenizer), tokenizer.special_tokens_map, tokenizer.all_special_tokens, watched


def _copied(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer

    inner: Any = tokenizer.backend_tokenizer
    # A deep copy of it writes and reads the whole vocabulary, a second for a large one.
    backend = Tokenizer(inner.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(inner, part)) is not None:
            setattr(backend, part, value)
    # Their ids count up from the vocabulary's last one, so in order they come out the same.
    added = sorted(inner.get_added_tokens_decoder().items())
    for special, entries in groupby(added, lambda entry: entry[1].special):
        (backend.add_special_tokens if special else backend.add_tokens)([t for _, t in entries])
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return copy.deepcopy(tokenizer, {id(inner): backend})
