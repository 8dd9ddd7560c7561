"""Kept rows are found by their ids alone, within their bytes, and change no answer."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amulet.backends.transformers.backend import SavedRow
from amulet.backends.transformers.model_backend import CHUNK
from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation
from amulet.decoding.prefix_cache import LEAST, KeptRow, Prefixes, shared_length
from tests.engines import engine_over
from tests.models import Kind, random_model
from tests.oracles.reference import generate


def kept(*ids: int) -> KeptRow:
    return KeptRow(ids, SavedRow((torch.zeros(1, len(ids), 4),), {}, []))


def ids(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def drain(engine: Engine) -> None:
    while engine.running:
        engine.step()


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_shared_length_is_the_longest_common_beginning(one: list[int], other: list[int]) -> None:
    length = shared_length(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


def test_the_longest_match_is_found_and_the_oldest_makes_room() -> None:
    row = kept(*range(40))
    store = Prefixes(limit=3 * row.saved.nbytes)
    for first in (1, 2, 3):
        store.keep(kept(first, *range(100, 139)))
    found, length = store.find([1, *range(100, 130), 7, 7])
    assert found is not None
    assert (found.ids[0], length) == (1, 31)
    store.keep(kept(4, *range(100, 139)))  # 2 is now the longest unused
    assert store.find([2, *range(100, 139)]) == (None, 0)
    assert store.find([1, *range(100, 139)])[1] == 40
    assert store.nbytes <= store.limit


def test_a_row_replaces_those_it_continues_and_too_large_or_short_ones_are_not_kept() -> None:
    store = Prefixes(limit=10_000)
    store.keep(kept(*range(20)))
    store.keep(kept(*range(30)))
    assert store.nbytes == kept(*range(30)).saved.nbytes
    store.keep(kept(*range(LEAST - 1)))
    store.keep(kept(*range(1000, 2000)))
    assert store.nbytes == kept(*range(30)).saved.nbytes
    assert store.find([*range(LEAST - 1), -1]) == (None, 0)
    store.clear()
    assert store.nbytes == 0


def test_of_a_long_conversation_only_the_rows_that_cover_it_are_kept() -> None:
    store, everything, behind = Prefixes(limit=2**30), list(range(1000)), 100
    for length in range(20, 1000, 20):
        least = max(length - behind, 0)
        store.keep(KeptRow(tuple(everything[:length]), kept(*range(length)).saved, least))
        for shared in range(LEAST, length + 1):  # any prompt that parts there finds all of it
            found, used = store.find([*everything[:shared], -1])
            assert found is not None
            assert used == shared >= found.least
    assert len(store._rows) <= 1000 / behind + 2


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_next_turn_computes_only_what_is_new(kind: Kind) -> None:
    model = random_model(kind, dtype=torch.float64)
    engine = engine_over(model, prefix_bytes=2**26)
    prompt, base = ids(1, 60), ids(2, 50)
    first = Generation(prompts=[prompt, base], weights=[3.0], max_new_tokens=12)
    engine.admit(first)
    drain(engine)
    turn = ids(3, 25)
    longer = [[*row, *first.token_ids, *turn] for row in (prompt, base)]
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    second = Generation(prompts=longer, weights=[3.0], max_new_tokens=20)
    engine.admit(second)
    hook.remove()
    assert widths == [len(turn) + 1], "the last token of an answer was never fed"
    drain(engine)
    assert second.token_ids == generate(model, longer[0], 20, base=longer[1], strength=2.0)


def test_a_base_prompt_is_computed_once_for_many_preferences() -> None:
    model = random_model("qwen2", dtype=torch.float64)
    engine = engine_over(model, prefix_bytes=2**26)
    base = ids(1, 200)
    tokens: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    generations = [
        Generation(prompts=[ids(10 + i, 40), base], weights=[3.0], max_new_tokens=10)
        for i in range(4)
    ]
    for generation in generations:
        engine.admit(generation)
    hook.remove()
    assert sum(tokens) < 200 + 4 * (40 + 40 + 8)
    drain(engine)
    for generation in generations:
        expected = generate(model, generation.prompts[0], 10, base=base, strength=2.0)
        assert generation.token_ids == expected


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_long_prefill_in_chunks_lets_the_others_go_on(kind: Kind) -> None:
    model = random_model(kind, dtype=torch.float64)
    model.config.max_position_embeddings = 2048
    engine = engine_over(model)
    short = Generation(prompts=[ids(1, 20)], max_new_tokens=40)
    brief = Generation(prompts=[ids(2, 20)], max_new_tokens=2)  # leaves during the prefill
    for generation in (brief, short):
        engine.admit(generation)
    before = len(short.token_ids)
    long, base = ids(5, 2 * CHUNK + 90), ids(6, CHUNK + 30)
    pair = Generation(prompts=[long, base], weights=[3.0], max_new_tokens=16)
    engine.admit(pair)
    assert brief.done
    assert len(short.token_ids) > before
    drain(engine)
    assert short.token_ids == generate(model, short.prompts[0], 40)
    assert pair.token_ids == generate(model, long, 16, base=base, strength=2.0)


def test_short_prompts_one_after_another_make_nobody_wait_for_long() -> None:
    """A step for every `CHUNK` tokens of prompts, not for each of eight short ones."""
    model = random_model("llama")
    engine = engine_over(model)
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for seed in range(8):
        engine.admit(Generation(prompts=[ids(seed, 200)], max_new_tokens=40))
    hook.remove()
    assert widths == [200, 200, 1, 200, 200, 1, 200, 200, 1, 200, 200]


def test_cancelling_in_the_middle_of_a_prefill_stops_it() -> None:
    model = random_model("llama")
    engine = engine_over(model)
    running = Generation(prompts=[ids(1, 20)], max_new_tokens=40)
    engine.admit(running)
    engine.step()
    long = Generation(prompts=[ids(3, 5 * CHUNK)], max_new_tokens=4)
    passes: list[int] = []

    def cancel(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        passes.append(kwargs["input_ids"].shape[1])
        long.finish_reason = "cancelled"

    hook = model.register_forward_pre_hook(cancel, with_kwargs=True)
    engine.admit(long)
    hook.remove()
    assert passes == [CHUNK, 1]
    assert engine.running == [running]
    drain(engine)
    assert (len(running.token_ids), long.token_ids, engine.backend.nbytes) == (40, [], 0)


def test_nothing_is_kept_unless_asked() -> None:
    engine = engine_over(random_model("llama"))
    engine.admit(Generation(prompts=[ids(1, 60)], max_new_tokens=3))
    drain(engine)
    assert engine.prefixes.nbytes == 0
