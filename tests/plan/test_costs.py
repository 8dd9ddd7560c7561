"""The formulae against the engine's own bytes, and against blocks counted one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, Request, RequestError
from amulet.backends.transformers.cache import COLUMN_STEP
from amulet.plan.costs import (
    Work,
    amulet_bytes,
    amulet_users,
    law,
    vllm_block_bytes,
    vllm_blocks,
    vllm_users,
)
from amulet.plan.shapes import find_shape, shape_of
from tests.models import random_model


@pytest.mark.parametrize(("dtype", "length"), [("float32", 150), ("bfloat16", 300)])
@pytest.mark.parametrize(("users", "preferences"), [(1, 0), (1, 1), (3, 1), (4, 2), (5, 0)])
def test_bytes_are_those_of_the_engine(
    tokenizer: PreTrainedTokenizerFast, users: int, preferences: int, dtype: str, length: int
) -> None:
    model = random_model("qwen2", dtype=getattr(torch, dtype))
    amulet = Amulet(model, tokenizer, drafts=False)
    amulet.end_ids = frozenset()  # each answer is as long as it may be
    wish, answer = "Be brief.", 40
    requests = [
        Request(
            messages=({"role": "user", "content": f"{i} " + "x" * length},),
            preference=[wish] * preferences or None,
            max_new_tokens=answer,
        )
        for i in range(users)
    ]
    streams = [amulet.start(request) for request in requests]
    prompts = [stream.generation.prompts for stream in streams]
    base = len(prompts[0][-1])
    alone = len(prompts[0][-2]) if preferences else 0
    work = Work(base, answer, preferences, len(prompts[0][0]) - base, alone=alone)
    assert {tuple(len(ids) + answer for ids in rows) for rows in prompts} == {tuple(work.rows)}
    most = 0
    for _ in streams[-1].events():
        most = max(most, amulet.cache_bytes)
    assert [len(stream.read().token_ids) for stream in streams] == [answer] * users
    shape = shape_of(model.config, "")
    assert most == amulet_bytes(shape, dtype, work, users, COLUMN_STEP) > 0


def blocks_one_by_one(work: Work, block: int) -> int:
    """Give every token an id, and keep a full block once for the same ids before and in it."""
    answer = [("answer", i) for i in range(work.answer)]
    lead = [("prompt", i) for i in range(work.shared)]
    tail = [("prompt", i) for i in range(work.shared, work.prompt)]
    rows = [
        [*lead, *(("wish", i, j) for j in range(work.preference_tokens)), *tail, *answer]
        for i in range(work.preferences)
    ]
    if work.preferences and work.alone:
        rows.append([*(("alone", i) for i in range(work.alone)), *answer])
    rows.append([*lead, *tail, *answer])
    full: set[Any] = set()
    partial = 0
    for row in rows:
        for start in range(0, len(row), block):
            if start + block <= len(row):
                full.add(tuple(row[: start + block]))
            else:
                partial += 1
    return len(full) + partial


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    block=st.integers(1, 32),
    prompt=st.integers(1, 200),
    answer=st.integers(1, 100),
    preferences=st.integers(0, 3),
    wish=st.integers(1, 40),
    data=st.data(),
)
def test_blocks_are_those_that_prefix_caching_keeps(
    block: int, prompt: int, answer: int, preferences: int, wish: int, data: st.DataObject
) -> None:
    shared = data.draw(st.integers(0, prompt))
    alone = data.draw(st.integers(0, 60))
    work = Work(prompt, answer, preferences, wish, shared, alone)
    assert vllm_blocks(work, block) == blocks_one_by_one(work, block)


def test_users_that_fit() -> None:
    shape, work = find_shape("llama-3.1-8b"), Work(1800, 200, shared=1776, alone=50)
    each = vllm_blocks(work)
    block = vllm_block_bytes(shape, "bfloat16")
    assert each == 111 + (125 - 111) + (126 - 111) + 16
    assert block == 16 * 128 * 2**10
    assert vllm_users(shape, "bfloat16", work, (3 * each + 1) * block) == 3
    assert vllm_users(shape, "bfloat16", work, (3 * each + 1) * block - 1) == 2
    assert vllm_users(shape, "bfloat16", work, -5.0) == 0
    for users in (1, 2, 4, 16):
        needed = amulet_bytes(shape, "bfloat16", work, users)
        assert amulet_users(shape, "bfloat16", work, needed) == users
        assert amulet_users(shape, "bfloat16", work, needed - 1) == users // 2
    assert amulet_bytes(shape, "bfloat16", work, 0) == 0


def test_the_law() -> None:
    assert law(100, 10, 1) == pytest.approx(120 / 110)
    assert law(100, 10, 5, preferences=3) == pytest.approx(300 / 150)
    assert law(100, 10, 5, preferences=0) == 1
    assert law(0, 10, 7) == 2  # nothing but cache: twice
    assert law(1e12, 1, 1) == pytest.approx(1)  # nothing but weights: free


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": 0}, "prompt=0: expected 1 or more"),
        ({"answer": 0}, "answer=0"),
        ({"preferences": -1}, "preferences=-1: expected 0 or more"),
        ({"shared": 11}, "shared=11: expected at most the prompt's 10 tokens"),
    ],
)
def test_what_is_out_of_range(options: dict[str, int], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Work(**{"prompt": 10, "answer": 5, **options})


def test_rows() -> None:
    assert Work(10, 5, 2, 3, alone=7).rows == [18, 18, 12, 15]
    assert Work(10, 5, 2, 3, alone=0).rows == [18, 18, 15]
    assert Work(10, 5, 2, 3).plain.rows == [15]
    assert Work(10, 5, 0).rows == [15]
    assert Work(10, 4, 1, 3, alone=7).mean == (13 + 2) + (7 + 2) + (10 + 2)
