"""Streamed text equals the full decode, cut at the first stop string, however tokens split it."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import IM_END, IM_START, byte_tokenizer
from tests.text import TextStream

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "a", "b", "ab", "▁a", "▁b", "▁▁", "你", "▁你", ".", "\n", "ba", "▁ab"]


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama_like() -> PreTrainedTokenizerFast:
    """BPE with byte_fallback; the first token's space is stripped, as in Llama 2 and Mistral."""
    vocab = {piece: rank for rank, piece in enumerate(["<unk>", *BYTE_TOKENS, *PIECES])}
    merges = [("a", "b"), ("b", "a"), ("▁", "▁"), ("▁", "ab"), ("▁", "a"), ("▁", "b"), ("▁", "你")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    return _fast(tokenizer)


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """Unigram with byte_fallback under the Metaspace pre-tokenizer and decoder, as in T5."""
    scores = [(piece, -len(BYTE_TOKENS) / 10 / len(piece)) for piece in PIECES]
    vocab = [("<unk>", 0.0), *((byte, -50.0) for byte in BYTE_TOKENS), *scores]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _fast(tokenizer)


def word_pieces() -> PreTrainedTokenizerFast:
    """WordPiece: the space stands before a token that doesn't continue a word."""
    vocab = {
        piece: rank for rank, piece in enumerate(["[UNK]", "un", "##like", "##ly", "not", "."])
    }
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _fast(tokenizer)


BYTES, LLAMA, UNIGRAM = byte_tokenizer(), llama_like(), metaspace_unigram()
EMOJI = "👩\u200d👩\u200d👧🏽 ok 🇨🇭!"

texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="ab 你é👧🏽\u200d\n\ufffd.", max_size=40),
    st.lists(st.sampled_from(["a", "b", " ", "  ", "ab", "你好", EMOJI, "\n\n", "."])).map("".join),
)
stops = st.lists(
    st.one_of(
        st.text(alphabet="ab 你\n.", min_size=1, max_size=4), st.text(min_size=1, max_size=2)
    ),
    max_size=3,
)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def full_decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The reference: read the text character by character until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        matched = [string for string in stop if text[:end].endswith(string)]
        if matched:
            longest = max(matched, key=len)
            return text[: end - len(longest)], longest
    return text, None


def stream_all(stream: TextStream, ids: list[int]) -> list[str]:
    pieces = [stream.push(token_id) for token_id in ids]
    return [*pieces, stream.finish()]


def assert_streams_as_decoded(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: list[str]
) -> None:
    stream = TextStream(tokenizer, stop)
    released = ""
    expected, matched = cut(full_decode(tokenizer, ids), stop)
    for take in (*(partial(stream.push, token_id) for token_id in ids), stream.finish):
        released += take()
        assert expected.startswith(released)
        assert stream.text == released
    assert (released, stream.stop_string) == (expected, matched)


@settings(max_examples=300)
@given(text=texts, stop=stops)
@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA, UNIGRAM], ids=["bytes", "llama", "unigram"])
def test_pieces_concatenate_to_the_full_decode(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    assert_streams_as_decoded(tokenizer, encode(tokenizer, text), stop)


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 319), max_size=60), stop=stops)
def test_any_ids_stream_as_they_decode(ids: list[int], stop: list[str]) -> None:
    """Bytes that are no characters, special tokens anywhere, ids beyond the tokenizer's."""
    assert_streams_as_decoded(BYTES, ids, stop)


@settings(max_examples=300)
@given(
    ids=st.lists(
        st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE4, 0xBD, 0xA0, 0x61, 0xFF, IM_END, 300]),
        max_size=80,
    )
)
def test_broken_bytes_stream_as_they_decode(ids: list[int]) -> None:
    assert_streams_as_decoded(BYTES, ids, [])


@settings(max_examples=200, deadline=None)
@given(text=texts, stop=stops, length=st.integers(0, 60))
def test_smollm_text_streams_as_it_decodes(
    smollm_tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str], length: int
) -> None:
    assert_streams_as_decoded(smollm_tokenizer, encode(smollm_tokenizer, text)[:length], stop)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), stop=stops)
def test_any_smollm_ids_stream_as_they_decode(
    smollm_tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: list[str]
) -> None:
    assert_streams_as_decoded(smollm_tokenizer, ids, stop)


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm: tuple[object, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return smollm[1]


def test_a_character_is_held_until_its_last_byte() -> None:
    pieces = stream_all(TextStream(BYTES), encode(BYTES, "é你👧a"))
    assert pieces == ["", "é", "", "", "你", "", "", "", "👧", "a", ""]


def test_a_joined_emoji_streams_character_by_character() -> None:
    pieces = [piece for piece in stream_all(TextStream(BYTES), encode(BYTES, EMOJI)) if piece]
    assert pieces == list(EMOJI)


def test_the_whole_part_of_a_half_released_token_does_not_wait() -> None:
    vocab = {"hi": 0, "Ġ": 1, "ä": 2, "½": 3, "ł": 4, "hiĠä": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    stream = TextStream(_fast(tokenizer))
    assert stream_all(stream, [5, 3, 4, 0]) == ["hi ", "", "你", "hi", ""]


def test_finish_releases_a_cut_off_character_as_decode_gives_it() -> None:
    ids = encode(BYTES, "a你")[:-1]
    assert stream_all(TextStream(BYTES), ids) == ["a", "", "", "\ufffd"]
    assert full_decode(BYTES, ids) == "a\ufffd"


def test_a_real_replacement_character_is_text() -> None:
    assert (
        "".join(stream_all(TextStream(BYTES), encode(BYTES, "a\ufffdb\ufffd"))) == "a\ufffdb\ufffd"
    )


def test_a_byte_run_that_breaks_off_keeps_its_whole_characters() -> None:
    ids = encode(LLAMA, "é好")[:-1]
    assert full_decode(LLAMA, ids) == "\ufffd" * 4  # decode itself loses the é
    assert "".join(stream_all(TextStream(LLAMA), ids)) == "é\ufffd\ufffd"


def test_a_byte_run_that_breaks_in_the_middle_goes_on_after_it() -> None:
    ids = [*encode(LLAMA, "é好")[:-1], LLAMA.convert_tokens_to_ids("ab")]
    assert stream_all(TextStream(LLAMA), ids) == ["", "", "é", "", "", "\ufffd\ufffdab", ""]


@pytest.mark.parametrize("tokenizer", [LLAMA, UNIGRAM], ids=["llama", "unigram"])
def test_only_the_first_space_of_a_sentencepiece_text_is_dropped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    a, space, spaced_a = (tokenizer.convert_tokens_to_ids(piece) for piece in ("a", "▁", "▁a"))
    bos = tokenizer.bos_token_id
    assert stream_all(TextStream(tokenizer), [spaced_a, spaced_a, a]) == ["a", " a", "a", ""]
    assert stream_all(TextStream(tokenizer), [bos, spaced_a, spaced_a]) == ["", "a", " a", ""]
    assert stream_all(TextStream(tokenizer), [space, spaced_a, bos, spaced_a]) == [
        "",
        " a",
        "",
        " a",
        "",
    ]


def test_word_pieces_stream() -> None:
    tokenizer = word_pieces()
    ids = encode(tokenizer, "not unlikely.")
    assert stream_all(TextStream(tokenizer), ids) == ["not", " un", "like", "ly", " .", ""]


def test_special_tokens_have_no_text() -> None:
    ids = [IM_START, 97, IM_END, 98, 319, 99, IM_END]
    assert stream_all(TextStream(BYTES), ids) == ["", "a", "", "b", "", "c", "", ""]


def test_special_tokens_have_text_when_asked_for() -> None:
    stream = TextStream(BYTES, skip_special_tokens=False)
    assert stream_all(stream, [97, IM_END]) == ["a", "<|im_end|>", ""]


def test_a_special_token_inside_a_character_leaves_it_whole() -> None:
    first, *rest = encode(BYTES, "你")
    assert "".join(stream_all(TextStream(BYTES), [first, IM_END, *rest])) == "你"


def test_a_stop_string_across_tokens_never_leaks() -> None:
    stream = TextStream(BYTES, ["\n\nQ:"])
    pieces = [stream.push(token_id) for token_id in encode(BYTES, "a\n\nb\n\nQ: c")]
    assert pieces == ["a", "", "", "\n\nb", "", "", "", "", "", ""]
    assert (stream.text, stream.stop_string) == ("a\n\nb", "\n\nQ:")
    assert stream.finish() == ""


def test_a_stop_string_inside_a_token_cuts_the_token() -> None:
    ids = [LLAMA.convert_tokens_to_ids(piece) for piece in ("ba", "▁ab", "ab")]
    stream = TextStream(LLAMA, [" a"])
    assert stream_all(stream, ids) == ["ba", "", "", ""]
    assert stream.stop_string == " a"


def test_a_beginning_of_a_stop_string_is_released_at_the_end() -> None:
    stream = TextStream(BYTES, ["END"])
    assert stream_all(stream, encode(BYTES, "an EN")) == ["a", "n", " ", "", "", "EN"]
    assert stream.stop_string is None


def test_a_held_beginning_is_released_when_it_turns_out_to_be_text() -> None:
    assert stream_all(TextStream(BYTES, ["aab"]), encode(BYTES, "aaac")) == [
        "",
        "",
        "a",
        "aac",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "stop", "expected", "matched"),
    [
        ("xabc", ["abc", "ab"], "x", "ab"),  # one is the beginning of the other
        ("xabc", ["bc", "c"], "xa", "bc"),  # complete together: the earlier start
        ("xabcd", ["abcd", "bc"], "xa", "bc"),  # the one that is complete first
        ("xabd", ["abc", "bd"], "xa", "bd"),  # a held beginning fails, its tail matches
        ("abab", ["ab"], "", "ab"),
        ("x你好y", ["你好"], "x", "你好"),
        ("x", ["y"], "x", None),
    ],
)
def test_which_stop_string_wins_does_not_depend_on_the_tokens(
    text: str, stop: list[str], expected: str, matched: str | None
) -> None:
    assert cut(text, stop) == (expected, matched)
    assert_streams_as_decoded(BYTES, encode(BYTES, text), stop)
    vocab = {piece: rank for rank, piece in enumerate(dict.fromkeys([text, *text]))}
    whole = _fast(Tokenizer(models.WordLevel(vocab=vocab, unk_token=text[0])))
    stream = TextStream(whole, stop)
    assert "".join(stream_all(stream, [0])) == expected
    assert stream.stop_string == matched


@pytest.mark.parametrize(
    ("stop", "ids", "text", "matched"),
    [
        (["<|im_start|>"], [97, IM_START, 98], "a", "<|im_start|>"),
        (["<|im_start|>us"], [97, IM_START, *b"user"], "a", "<|im_start|>us"),
        (["<|im_start|>us"], [97, IM_START, *b"un", IM_START, *b"us"], "aun", "<|im_start|>us"),
        (["b<|im_start|>"], [97, 98, IM_START], "a", "b<|im_start|>"),
        (["<|im_start|><|endoftext|>"], [97, IM_START, 258, 98], "a", "<|im_start|><|endoftext|>"),
        (["<|im_start|>c"], [97, IM_START, 98], "ab", None),
        (["<|im_start|>"], [97, *b"<|im_start|>"], "a", "<|im_start|>"),  # as ordinary tokens
        (["<|im_start|>", "b"], [97, 98, IM_START], "a", "b"),
        (["<|im_end|>"], [97, IM_START, 98], "ab", None),
    ],
)
def test_special_tokens_in_stop_strings(
    stop: list[str], ids: list[int], text: str, matched: str | None
) -> None:
    stream = TextStream(BYTES, stop)
    assert "".join(stream_all(stream, ids)) == stream.text == text
    assert stream.stop_string == matched


@pytest.mark.parametrize("tokenizer", [LLAMA, UNIGRAM], ids=["llama", "unigram"])
@pytest.mark.parametrize("before", ["a", "ab ba.", "a ", "你", "\n"])
@pytest.mark.parametrize("text", ["a", " a b", " ", "  a", " 你", ".", "\n a"])
def test_an_answer_that_goes_on_keeps_its_first_space(
    tokenizer: PreTrainedTokenizerFast, before: str, text: str
) -> None:
    ids = encode(tokenizer, before + text)
    for cut_at in range(1, len(ids)):
        known = full_decode(tokenizer, ids[:cut_at])
        if full_decode(tokenizer, ids).startswith(known) and "\ufffd" not in known:
            stream = TextStream(tokenizer, context=ids[:cut_at])
            assert known + "".join(stream_all(stream, ids[cut_at:])) == before + text


@pytest.mark.parametrize(
    ("tokenizer", "ids"),
    [
        (BYTES, encode(BYTES, "Some words 你好 👧 " * 40)),
        (LLAMA, encode(LLAMA, "你好 né 👧👧👧 " * 40)),
        (UNIGRAM, encode(UNIGRAM, "ab 你好 👧👧👧 " * 40)),
        (BYTES, [0xFF] * 400),
        (BYTES, [0xE4, 0xBD] * 200),
        (BYTES, [IM_END, 319] * 200),
        (LLAMA, LLAMA.convert_tokens_to_ids(["<0xE4>", "<0xBD>"]) * 200),
    ],
)
def test_a_push_decodes_few_ids_however_long_the_answer(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = tokenizer.decode

    def counting(token_ids: list[int], **options: bool) -> str:
        decoded.append(len(token_ids))
        return str(decode(token_ids, **options))

    monkeypatch.setattr(tokenizer, "decode", counting)
    stream_all(TextStream(tokenizer), ids)
    assert max(decoded) <= 18
    assert sum(decoded) <= 200 * len(ids)
