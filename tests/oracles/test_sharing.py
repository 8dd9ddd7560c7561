"""Whatever shares the batch, each request gets the tokens that it gets alone."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from amulet import Amulet
from amulet.backends.transformers.model_backend import CHUNK
from tests.models import random_model

PREFERENCES: list[Any] = [
    None,
    "Be brief.",
    ["Be brief.", {"text": "Use lists.", "weight": -0.5}],
    "",
    {"text": "Talk like a pirate.", "weight": 0.7},
]


def requests() -> list[dict[str, Any]]:
    """Plain and steered, greedy and sampled, short and longer than a chunk."""
    rng = random.Random(0)
    made = []
    for i in range(24):
        length = CHUNK + 40 if i % 11 == 3 else rng.randrange(4, 60)
        text = "".join(rng.choice("abcdefgh ") for _ in range(length)) + "?"
        made.append(
            {
                "messages": [{"role": "user", "content": text}],
                "preference": PREFERENCES[i % len(PREFERENCES)],
                "strength": rng.choice([0.0, 1.0, 3.5]),
                "floor": rng.choice([0.0, 0.1]),
                "placement": rng.choice(["system", "user", "both"]),
                "temperature": rng.choice([0.0, 0.0, 0.9]),
                "seed": i,
                "max_new_tokens": rng.choice([1, 7, 30]),
            }
        )
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    model = random_model("gemma3", dtype=torch.float64)
    model.config.max_position_embeddings = 2048
    return model


@pytest.fixture(scope="module")
def alone(model: Any, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, ...]]:
    amulet = Amulet(model, tokenizer, prefix_cache_bytes=0)
    return [amulet.chat(**request).token_ids for request in requests()]


@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**20, 2**28])
@pytest.mark.parametrize("max_rows", [1, 5, 64])
def test_a_batch_gives_what_each_gives_alone(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    alone: list[tuple[int, ...]],
    prefix_cache_bytes: int,
    max_rows: int,
) -> None:
    amulet = Amulet(model, tokenizer, max_rows=max_rows, prefix_cache_bytes=prefix_cache_bytes)
    order = list(range(len(alone)))
    random.Random(max_rows).shuffle(order)
    replies = amulet.batch([requests()[i] for i in order])
    assert [reply.token_ids for reply in replies] == [alone[i] for i in order]  # type: ignore[union-attr]


def test_threads_that_come_and_go_get_what_each_gets_alone(
    model: Any, tokenizer: PreTrainedTokenizerFast, alone: list[tuple[int, ...]]
) -> None:
    amulet = Amulet(model, tokenizer, max_rows=12)
    got: dict[int, tuple[int, ...]] = {}

    def work(start: int) -> None:
        rng = random.Random(start)
        for i in range(start, len(alone), 6):
            request = requests()[i]
            if rng.random() < 0.5:  # somebody leaves in the middle of an answer
                stream = amulet.stream(**request)
                next(stream, None)
                stream.close()
            got[i] = amulet.chat(**request).token_ids

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [got[i] for i in range(len(alone))] == alone
    assert amulet._engine.backend.nbytes == 0
