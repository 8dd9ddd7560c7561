"""`logprobs` match the content: its tokens, with their own bytes, and where they begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amulet import Amulet
from amulet.output.stop_sequences import StopStrings
from amulet.reply import Event, TokenTrace
from amulet.serve.logprobs import Content, TokenBytes, Written
from tests.models import byte_tokenizer
from tests.output.test_detokenizer import LLAMA, UNIGRAM
from tests.serve.conftest import saying, user
from tests.serve.test_chat import CALL, WEATHER, chunks, post
from tests.templates import family_tokenizer
from tests.text import TextStream

BYTES = byte_tokenizer()


def written(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()
) -> tuple[str, list[Written]]:
    """Return an answer's content, and its tokens as they come with the pieces of a stream."""
    stream, stops = TextStream(tokenizer), StopStrings(stop)
    content, found, said = Content(TokenBytes(tokenizer)), [], ""
    waiting: list[TokenTrace] = []

    def release(text: str, ended: bool = False) -> None:
        nonlocal said
        piece = stops.push(text, ended=ended)
        said += piece
        if piece:
            found.extend(content.take(Event("text", piece, tuple(waiting))))
            waiting.clear()

    for id_ in ids:
        text = str(tokenizer.decode([id_]))
        waiting.append(TokenTrace(id_, text, -1.0, -1.0, -1.0, id_, text))
        release(stream.push(id_))
        if stops.found is not None:
            break
    release(stream.finish(), ended=True)
    found.extend(content.take(Event("text", "", tuple(waiting))))
    return said, found + content.end()


def assert_matches(said: str, found: Sequence[Written]) -> None:
    assert b"".join(one.raw for one in found) == said.encode()
    offsets = [one.offset for one in found]
    assert offsets == sorted(offsets)
    for one in found:
        if "\N{REPLACEMENT CHARACTER}" not in one.text:
            assert said.startswith(one.text, one.offset)


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA, UNIGRAM], ids=["bytes", "llama", "unigram"])
@given(text=st.text(st.sampled_from("ab 你é👩\n."), max_size=12), stop=st.text("ab 你", max_size=3))
def test_tokens_add_up_to_the_content(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert_matches(*written(tokenizer, ids))
    if stop:
        assert_matches(*written(tokenizer, ids, [stop]))


@given(ids=st.lists(st.integers(0, 319), max_size=30))
def test_bytes_that_are_no_characters_are_kept(ids: list[int]) -> None:
    said, found = written(BYTES, ids)
    raw = b"".join(one.raw for one in found)
    assert raw == bytes(id_ for id_ in ids if id_ < 256)
    assert raw.decode("utf-8", "replace") == said


def test_a_broken_run_of_byte_tokens_leaves_the_rest_alone() -> None:
    ids = LLAMA.convert_tokens_to_ids(["▁a", "<0xE2>", "<0x82>", "b", "▁a"])
    said, found = written(LLAMA, ids)
    assert said.endswith("b a")
    assert [one.token.token_id for one in found] == ids
    assert [one.raw for one in found] == [b"a", b"\xe2", b"\x82", b"b", b" a"]
    assert found[-1].offset == len(said) - 2


def test_a_token_that_a_stop_string_cuts(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    tokenizer = smollm[1]
    ids = tokenizer.encode("The weather is wonderful", add_special_tokens=False)
    said, found = written(tokenizer, ids, ["nder"])
    assert said == "The weather is wo"
    assert [one.text for one in found] == ["The", " weather", " is", " wo"]
    assert [one.offset for one in found] == [0, 3, 11, 14]
    assert_matches(said, found)


async def test_bytes_of_a_character_that_tokens_share(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = saying(tokenizer, "é€")
    options: dict[str, Any] = {"messages": user("hi"), "logprobs": True, "top_logprobs": 1}
    whole = (await post(amulet, **options))["choices"][0]["logprobs"]["content"]
    streamed = [
        entry
        for chunk in await chunks(amulet, **options)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    for content in (whole, streamed):
        raw = [[0xC3], [0xA9], [0xE2], [0x82], [0xAC]]
        assert [entry["bytes"] for entry in content] == raw
        assert [entry["top_logprobs"][0]["bytes"] for entry in content] == raw


@pytest.mark.parametrize(
    ("stop", "said"), [([" three"], "one two"), (["o t"], "one tw"), (["ne", "zz"], "o")]
)
async def test_a_stop_string_is_not_among_them(
    tokenizer: PreTrainedTokenizerFast, stop: list[str], said: str
) -> None:
    amulet = saying(tokenizer, "one two three")
    options: dict[str, Any] = {"messages": user("hi"), "logprobs": True, "stop": stop}
    choice = (await post(amulet, **options))["choices"][0]
    assert choice["message"]["content"] == said
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == said
    text = tokens = ""
    for chunk in await chunks(amulet, **options):
        choice = chunk["choices"][0]
        text += choice["delta"].get("content", "")
        tokens += "".join(e["token"] for e in (choice["logprobs"] or {"content": []})["content"])
    assert text == tokens == said
    raw = await post(amulet, "/v1/completions", prompt="hi\n", logprobs=1, stop=stop, max_tokens=50)
    found = raw["choices"][0]
    assert "".join(found["logprobs"]["tokens"]) == found["text"] == said


async def test_what_a_stop_string_held_back_comes_with_its_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet = saying(tokenizer, "aab aax")
    options: dict[str, Any] = {"messages": user("hi"), "logprobs": True, "stop": ["aaz", "x"]}
    said = []
    for chunk in await chunks(amulet, **options):
        choice = chunk["choices"][0]
        listed = (choice["logprobs"] or {"content": []})["content"]
        said.append((choice["delta"].get("content", ""), [entry["token"] for entry in listed]))
    assert "".join(text for text, _ in said) == "aab aa"
    assert [token for _, tokens in said for token in tokens] == list("aab aa")
    assert all("".join(tokens) == text for text, tokens in said)


async def test_text_offsets_go_on_in_a_stream(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = saying(tokenizer, "aé€ b")
    path = "/v1/completions"
    options: dict[str, Any] = {"prompt": "hi\n", "logprobs": 1, "n": 2, "max_tokens": 20}
    whole = await post(amulet, path, **options)
    for choice in whole["choices"]:
        assert choice["text"] == "aé€ b"
        assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 3, 4]
    offsets: list[list[int]] = [[], []]
    for chunk in await chunks(amulet, path, **options):
        choice = chunk["choices"][0]
        offsets[choice["index"]] += (choice["logprobs"] or {"text_offset": []})["text_offset"]
    assert offsets == [[0, 1, 1, 2, 2, 2, 3, 4]] * 2


async def test_thinking_and_calls_are_not_content() -> None:
    amulet = saying(family_tokenizer("qwen"), f"<think>\nWait\n</think>\n\nWait. {CALL}")
    options = {"messages": user("hi"), "tools": [WEATHER], "logprobs": True}
    choice = (await post(amulet, **options))["choices"][0]
    assert choice["message"]["reasoning_content"] == "Wait"
    assert choice["message"]["content"] == "Wait."
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "Wait."
    text = tokens = ""
    for chunk in await chunks(amulet, **options):
        choice = chunk["choices"][0]
        text += choice["delta"].get("content", "")
        tokens += "".join(e["token"] for e in (choice["logprobs"] or {"content": []})["content"])
    assert text == tokens == "Wait."


async def test_an_answer_that_is_cut_inside_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet: Amulet = saying(tokenizer, "a€")
    found = await post(amulet, messages=user("hi"), logprobs=True, max_tokens=3)
    choice = found["choices"][0]
    assert choice["message"]["content"] == "a\N{REPLACEMENT CHARACTER}"
    assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [[0x61], [0xE2], [0x82]]
