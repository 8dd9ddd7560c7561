"""vLLM's engine gives, token for token, what Amulet's own engine gives (float32)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM

from amulet import Amulet
from tests.vllm.engines import answers, expected, scheduler, start_engine, translate
from tests.vllm.folders import save_model

WISHES = ("Be brief.", "Write in rhymes, each line of them a long one.", "Use no verbs.", "Shout!")


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, Amulet]]:
    """A vLLM engine with little memory and small steps, and Amulet's own on the same model."""
    folder = save_model(tmp_path_factory.mktemp(request.param), request.param, window=448)
    engine = start_engine(
        folder,
        max_model_len=448,
        max_num_seqs=8,
        max_num_batched_tokens=48,  # long prompts are read in parts
        num_gpu_blocks_override=30,
    )
    yield engine, Amulet.from_pretrained(str(folder), dtype="float32", drafts=False)
    engine.llm_engine.engine_core.shutdown()


def chat(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **options}


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(("red", "fish", "of", "seven", "stars")) for _ in range(count))


def test_pairs_of_different_lengths(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    rng = random.Random(1)
    requests = [
        chat(
            words(rng, rng.randrange(1, 30)),
            preference=rng.choice(WISHES),
            strength=rng.choice((0.5, 2.0, 4.6487, -0.5)),
            floor=rng.choice((0.0, 0.1)),
            placement=rng.choice(("system", "user", "both")),
            focus=rng.choice((0.0, 1.0)),
            loop_guard=rng.choice((0, 1, 4)),
            max_new_tokens=rng.randrange(1, 40),
        )
        for _ in range(14)
    ]
    assert answers(engine, requests) == expected(amulet, requests)


def test_several_preferences(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    requests = [
        chat("Tell me a tale.", preference=list(WISHES[:count]), strength=3.0)
        for count in (2, 3, 4)
    ]
    requests.append(
        chat("Hm?", preference=["Be kind.", {"text": "Be long-winded.", "weight": -0.7}])
    )
    assert answers(engine, requests) == expected(amulet, requests)


def test_plain_and_steered_together(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    rng = random.Random(2)
    requests = [
        chat(words(rng, 12), preference=WISHES[i % 4] if i % 2 else None, max_new_tokens=10 + i)
        for i in range(12)
    ]
    assert answers(engine, requests) == expected(amulet, requests)


def test_neither_end_of_the_dial_takes_a_pair(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    requests = [chat("Hello.", preference=WISHES[1], strength=strength) for strength in (0.0, -1.0)]
    assert all(translate(engine, each)[1].extra_args is None for each in requests)
    assert answers(engine, requests) == expected(amulet, requests)


def test_drawn_tokens_are_the_same_too(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    options = {"preference": WISHES[0], "temperature": 0.9, "max_new_tokens": 20}
    requests = [
        chat("Once", seed=3, **options),
        chat("Twice", seed=4, top_p=0.8, **options),
        chat("Thrice", seed=5, top_k=5, min_p=0.05, **options),
        chat("Four times", seed=6, repetition_penalty=1.3, **options),
    ]
    assert answers(engine, requests) == expected(amulet, requests)


def test_penalties_see_the_base_prompt(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    requests = [
        chat(f"Number {i}", preference=WISHES[i], repetition_penalty=1.5, strength=strength)
        for i, strength in enumerate((2.0, 1.0, 0.5, 3.0))
    ]
    assert answers(engine, requests) == expected(amulet, requests)


def test_raw_prompts(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    requests = [
        {"prompt": prompt, "preference": WISHES[0]} for prompt in ("The river", "A", "It was " * 20)
    ]
    assert answers(engine, requests) == expected(amulet, requests)


@pytest.mark.parametrize(
    ("focus", "seeds", "length", "tokens"), [(0.0, (0, 1, 2, 3), 14, 90), (1.0, (2, 3), 30, 140)]
)
def test_pairs_that_make_room_come_back_whole(
    both: tuple[LLM, Amulet],
    monkeypatch: pytest.MonkeyPatch,
    focus: float,
    seeds: tuple[int, ...],
    length: int,
    tokens: int,
) -> None:
    engine, amulet = both
    preempted: list[str] = []
    own = scheduler(engine)._preempt_request
    monkeypatch.setattr(
        scheduler(engine),
        "_preempt_request",
        lambda row, *args, **options: (
            preempted.append(row.request_id),
            own(row, *args, **options),
        )[1],
    )
    # They grow to some 1,500 tokens, where there is room for 960.
    settings = {"strength": 3.0, "focus": focus, "max_new_tokens": tokens}
    requests = [
        chat(words(random.Random(seed), length), preference=WISHES[i], **settings)
        for i, seed in enumerate(seeds)
    ]
    drawn = {"temperature": 1.0, "seed": 9, "focus": focus, "max_new_tokens": 90}
    requests.append(chat("A drawn one", preference=WISHES[1], **drawn))
    assert answers(engine, requests) == expected(amulet, requests)
    assert preempted


def test_pairs_that_enter_late_and_leave_early(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    rng = random.Random(5)
    requests = [
        chat(
            words(rng, rng.randrange(1, 24)),
            preference=WISHES[i % 4] if i % 5 else None,
            max_new_tokens=rng.randrange(8, 40),
        )
        for i in range(16)
    ]
    wanted = expected(amulet, requests)
    core = engine.llm_engine
    found: dict[str, tuple[int, ...]] = {}
    left = list(enumerate(requests))
    aborted = set()
    steps = 0
    while left or core.has_unfinished_requests():
        if left and steps % 3 == 0:
            number, each = left.pop(0)
            prompt, params = translate(engine, each)
            core.add_request(str(number), prompt, params)
        if steps % 7 == 5 and found:
            running = [name for name, ids in found.items() if len(ids) < 4 and name not in aborted]
            if running:
                aborted.add(running[-1])
                core.abort_request([running[-1]])
        for output in core.step():
            found[output.request_id] = tuple(output.outputs[0].token_ids)
        steps += 1
    assert aborted
    assert len(found) == len(requests)
    for name, ids in found.items():
        assert ids == (wanted[int(name)][: len(ids)] if name in aborted else wanted[int(name)])
    own = scheduler(engine)
    assert not own.requests
    assert not own._groups
    assert own.kv_cache_manager.block_pool.get_num_free_blocks() == 29


def test_an_answer_ends_where_the_longest_row_is_full(both: tuple[LLM, Amulet]) -> None:
    engine, amulet = both
    long = chat(
        "word " * 60, preference="Be brief. " * 7, strength=3.0, max_new_tokens=500, focus=0.0
    )
    wanted = expected(amulet, [long])
    assert answers(engine, [long]) == wanted
