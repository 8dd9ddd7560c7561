"""One model under several `Amulet`s, and under its owner's own calls, at the same time."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from amulet import Amulet, RequestError
from tests.models import ScriptedModel, random_model

LONG = "The quick brown fox jumps over the lazy dog. " * 12
LEAST = 5  # rounds


def at_once(*works: Callable[[], None]) -> None:
    """Run each in a thread, and raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("options", [{}, {"drafts": False}], ids=["alike", "of other options"])
def test_two_amulets_over_one_model_decode_their_own_answers(
    tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    model = random_model("llama", dtype=torch.float64)
    model.config.max_position_embeddings = 2048
    request: dict[str, Any] = {"prompt": LONG, "preference": "Be brief.", "max_new_tokens": 12}
    expected = Amulet(model, tokenizer).batch([request])[0].token_ids  # type: ignore[union-attr]
    amulets = [
        Amulet(model, tokenizer, prefix_cache_bytes=0),
        Amulet(model, tokenizer, prefix_cache_bytes=0, **options),
    ]

    def ask(amulet: Amulet) -> None:
        for _ in range(LEAST):
            assert amulet.complete(**request).token_ids == expected

    at_once(*(lambda amulet=amulet: ask(amulet) for amulet in amulets))  # type: ignore[misc]


def test_its_owner_generates_while_it_decodes(tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_model("llama", dtype=torch.float64)
    model.config.max_position_embeddings = 2048
    amulet = Amulet(model, tokenizer, prefix_cache_bytes=0)
    ids = torch.tensor([tokenizer.encode(LONG)])

    def generate() -> list[int]:
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=258)
        return [int(token) for token in out[0, ids.shape[1] :]]

    expected = generate()
    before = model.config.to_dict()
    seen: set[str] = set()
    layer: Any = model.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))

    def own() -> None:
        for _ in range(2 * LEAST):
            assert generate() == expected

    def ours() -> None:
        for _ in range(2 * LEAST):
            assert list(amulet.complete(LONG, max_new_tokens=12).token_ids) == expected

    at_once(own, ours)
    assert seen == {"sdpa"}
    assert model.config.to_dict() == before


def test_an_amulet_is_made_while_another_decodes(tokenizer: PreTrainedTokenizerFast) -> None:
    model = ScriptedModel(tokenizer, "a long answer")
    made: list[Amulet] = []

    class Making(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            made.append(Amulet(model, tokenizer, max_rows=len(made) + 1))  # type: ignore[arg-type]
            return scores

    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    messages = [{"role": "user", "content": "hi"}]
    reply = amulet.chat(messages, logits_processor=[Making()])
    assert reply.text == made[0].chat(messages).text == "a long answer"


name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")


class Recording(LogitsProcessor):
    """Notes whose context it is called in."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.seen.add(name.get())
        return scores


def test_processors_run_in_their_callers_context(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = Amulet(ScriptedModel(tokenizer, "a long answer"), tokenizer)  # type: ignore[arg-type]
    messages = [{"role": "user", "content": "hi"}]
    processors = {who: Recording() for who in ("ada", "ben", "cy")}

    def ask(who: str) -> None:
        name.set(who)
        for _ in range(LEAST):
            assert amulet.chat(messages, logits_processor=[processors[who]])

    at_once(*(lambda who=who: ask(who) for who in processors))  # type: ignore[misc]
    assert {who: processor.seen for who, processor in processors.items()} == {
        who: {who} for who in processors
    }


async def test_async_processors_run_in_the_context_that_asked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet = Amulet(ScriptedModel(tokenizer, "a long answer"), tokenizer)  # type: ignore[arg-type]
    processor = Recording()
    name.set("ada")
    stream = amulet.astream([{"role": "user", "content": "hi"}], logits_processor=[processor])
    name.set("ben")
    assert (await stream.read()).text == "a long answer"
    assert processor.seen == {"ada"}


def test_a_trace_can_be_read_while_it_grows(tokenizer: PreTrainedTokenizerFast) -> None:
    model = ScriptedModel(tokenizer, "a long answer " * 20)
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    stream = amulet.stream([{"role": "user", "content": "hi"}], trace=True, max_new_tokens=200)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            trace, ids = stream.trace, stream.generation.token_ids
            assert trace is not None
            assert [step.token_id for step in trace] == ids[: len(trace)]

    def read() -> None:
        try:
            stream.read()
        finally:
            done.set()

    at_once(look, read)


def test_a_processor_can_not_await_the_model_that_calls_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet = Amulet(ScriptedModel(tokenizer, "hello"), tokenizer)

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        asyncio.run(amulet.acomplete("y"))
        return scores

    with pytest.raises(RequestError, match="use another model"):
        amulet.complete("x", logits_processor=[ask])
    assert amulet.complete("x").text == "hello"
