"""Amulet's own copy of the tokenizer: other threads' calls and later changes of the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from amulet import Amulet, Grammar
from amulet.prompting.tokenizer import own_tokenizer
from tests.models import ScriptedModel, byte_tokenizer
from tests.templates import FAMILIES, family_tokenizer


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@contextmanager
def hammered(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Meanwhile, two threads call the tokenizer with padding and truncation."""
    over = threading.Event()
    failures: list[BaseException] = []

    def hammer(length: int) -> None:
        try:
            while not over.is_set():
                tokenizer("x" * 9, padding="max_length", truncation=True, max_length=length)
                tokenizer("x" * 9, split_special_tokens=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(length,)) for length in (3, 900)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not failures  # nothing of Amulet's is in the caller's way either


def test_prompts_and_answers_while_others_pad_and_cut() -> None:
    tokenizer = byte_tokenizer()
    answer = '{"a": "0123456789"}'
    amulet = Amulet(ScriptedModel(tokenizer, answer), tokenizer)  # type: ignore[arg-type]
    texts = [f"Question {number}: {'why? ' * 20}" for number in range(500)]

    def encoded(text: str) -> Any:
        return (
            amulet.encode_chat(user(text)),
            amulet.encode(text),
            amulet.count_tokens(text),
        )

    expected = [encoded(text) for text in texts]
    with hammered(tokenizer), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encoded, texts)) == expected
        for grammar in (None, Grammar.json_object()):
            replies = pool.map(
                lambda text, grammar=grammar: amulet.chat(
                    user(text), preference="Be brief.", grammar=grammar, trace=True
                ),
                texts[:10],
            )
            for reply, text in zip(replies, texts, strict=False):
                assert reply.text == answer
                traced = "".join(token.text for token in reply.trace or ())
                assert traced.removesuffix("<|im_end|>") == answer
                prompts = amulet.encode_chat(user(text))
                more = 0 if grammar else len(b"\n\nBe brief.")  # a grammar's answer is not steered
                assert reply.usage.prompt_tokens == len(prompts) + more
        assert amulet.complete("Go", preference="Be brief.").usage.prompt_tokens == 13


def test_a_tokenizer_that_is_padding_already() -> None:
    tokenizer = byte_tokenizer()
    amulet = Amulet(ScriptedModel(tokenizer, "yes"), tokenizer)  # type: ignore[arg-type]
    tokenizer(["a"], padding="max_length", truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.padding is not None
    assert bytes(amulet.encode("abcdefgh")) == b"abcdefgh"
    assert tokenizer.backend_tokenizer.padding["length"] == 4  # the caller's is left as it is


@pytest.mark.parametrize("name", FAMILIES)
def test_the_copy_reads_and_writes_as_the_original(name: str) -> None:
    tokenizer = family_tokenizer(name)
    own = own_tokenizer(tokenizer)
    assert own is not tokenizer
    assert own_tokenizer(tokenizer) is own
    assert type(own) is type(tokenizer)
    assert own.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    text = " ".join(["Hé\n\n", *tokenizer.get_added_vocab()])
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_later_changes_of_the_callers_tokenizer_are_seen() -> None:
    tokenizer = byte_tokenizer()
    amulet = Amulet(ScriptedModel(tokenizer, "yes"), tokenizer)  # type: ignore[arg-type]
    assert amulet.tokenizer is tokenizer
    assert amulet.chat(user("hi")).text == "yes"
    tokenizer.add_tokens([AddedToken("<think>")])
    assert amulet.encode("<think>") == [259]
    tokenizer.chat_template = "{{ messages[0].content }}>"
    assert bytes(amulet.encode_chat(user("hi"))) == b"hi>"
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert amulet.encode("<s>") == [260]
    assert amulet.complete("hi<s>", preference="a<s>").usage.prompt_tokens == 9


def test_a_tokenizer_in_python_keeps_no_such_state() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert own_tokenizer(tokenizer) is tokenizer
    model = ScriptedModel(byte_tokenizer(), "yes", vocab_size=len(tokenizer))
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    expected = [byte + 3 for byte in b"x" * 40]
    with hammered(tokenizer):
        assert all(amulet.encode_chat(user("x" * 40)) == expected for _ in range(200))
