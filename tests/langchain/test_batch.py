"""Many at once: shared forward passes, each item its own; the event loop never blocked."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField, RunnableParallel
from transformers.modeling_outputs import CausalLMOutputWithPast

from amulet import Amulet, RequestError, Steering
from amulet_integrations.langchain import AmuletLLM, ChatAmulet
from tests.langchain.scripted import scripted_chat
from tests.models import ScriptedModel, byte_tokenizer

ANSWERS = {f"q{number}": f"answer {number} in {'x' * 20}" for number in range(8)}
QUESTIONS = list(ANSWERS)
STEPS = 33  # forward passes of one answer, its prefill included


class SlowModel(ScriptedModel):
    """Takes ten milliseconds a step, as a real model does: threads have the time to join."""

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any
    ) -> CausalLMOutputWithPast:
        time.sleep(0.01)
        return super().forward(input_ids, past_key_values=past_key_values, **options)


def slow(answers: Any) -> ChatAmulet:
    tokenizer = byte_tokenizer()
    model: Any = SlowModel(tokenizer, answers)
    return ChatAmulet(amulet=Amulet(model, tokenizer, steering=Steering(placement="system")))


def passes(chat: Any) -> int:
    """Forward passes since the last look."""
    calls = chat.engine.model.calls
    count = len(calls)
    calls.clear()
    return count


def chat() -> ChatAmulet:
    return slow(ANSWERS)


def test_eight_in_a_batch_take_the_steps_of_one() -> None:
    model = chat()
    alone = model.invoke("q0").content
    one = passes(model)
    replies = model.batch(QUESTIONS)
    assert [reply.content for reply in replies] == list(ANSWERS.values())
    assert replies[0].content == alone
    assert passes(model) < one + 16  # a prefill each at most; alone it would be eight times one


async def test_abatch_and_concurrent_tasks_share_too() -> None:
    model = chat()
    await model.ainvoke("q0")
    one = passes(model)
    replies: list[Any] = await model.abatch(list(QUESTIONS))
    assert [reply.content for reply in replies] == list(ANSWERS.values())
    assert passes(model) < one + 16
    replies = await asyncio.gather(*(model.ainvoke(question) for question in QUESTIONS))
    assert [reply.content for reply in replies] == list(ANSWERS.values())
    assert passes(model) < one + 16


async def test_generate_with_many_chats_shares_too() -> None:
    model = chat()
    model.invoke("q0")
    one = passes(model)
    chats: list[Any] = [[HumanMessage(question)] for question in QUESTIONS]
    result = model.generate(chats)
    assert [row[0].text for row in result.generations] == list(ANSWERS.values())
    assert result.run is not None
    assert len({info.run_id for info in result.run}) == 8
    assert passes(model) < one + 16
    result = await model.agenerate(chats)
    assert [row[0].text for row in result.generations] == list(ANSWERS.values())
    assert passes(model) < one + 16


def test_branches_of_a_parallel_share_and_keep_their_preferences() -> None:
    model = slow({"system\nA": "A says " + "x" * 20, "": "plain is " + "y" * 20})
    text = StrOutputParser()
    both: Any = RunnableParallel(a=model.bind(preference="A") | text, b=model | text)
    assert both.invoke("x") == {"a": "A says " + "x" * 20, "b": "plain is " + "y" * 20}
    assert passes(model) < 1.5 * STEPS


def test_each_item_has_its_own_config_callbacks_and_error() -> None:
    class Ends(BaseCallbackHandler):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_llm_end(self, response: Any, **_: Any) -> None:
            self.heard.append(response.generations[0][0].text)

    model = scripted_chat({"system\nA": "A!", "system\nB": "B!", "": "plain"})
    first, second = Ends(), Ends()
    configs: Any = [
        {"callbacks": [first], "configurable": {"preference": "A"}},
        {"callbacks": [second], "configurable": {"preference": "B"}},
        {},
        {"configurable": {"placement": "nowhere", "preference": "A"}},
    ]
    replies: list[Any] = model.batch(["x"] * 4, configs, return_exceptions=True)
    assert [reply.content for reply in replies[:3]] == ["A!", "B!", "plain"]
    assert isinstance(replies[3], RequestError)
    assert (first.heard, second.heard) == (["A!"], ["B!"])
    with pytest.raises(RequestError, match="placement='nowhere'"):
        model.batch(["x"] * 4, configs)


@pytest.mark.parametrize("given", ["Hi", 5, None, {"question": "Hi"}])
async def test_what_is_no_list_of_inputs_is_told(given: Any) -> None:
    model = scripted_chat({"": "plain"})
    kind = type(given).__name__
    for name in ("batch", "batch_as_completed", "abatch", "abatch_as_completed"):
        call = getattr(model, name)
        with pytest.raises(RequestError, match=rf"^{name}: inputs is a {kind}: expected a list of"):
            await call(given) if name == "abatch" else call(given)


def test_the_callers_limit_and_empty_batches() -> None:
    model = chat()
    limited: Any = {"max_concurrency": 1}
    assert [r.content for r in model.batch(QUESTIONS[:2], limited)] == list(ANSWERS.values())[:2]
    assert limited == {"max_concurrency": 1}
    assert model.batch([]) == []


@pytest.mark.parametrize("streaming", [False, True])
async def test_the_event_loop_goes_on_while_tokens_come(streaming: bool) -> None:
    model = slow("z" * 40)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticking = asyncio.create_task(tick())
    if streaming:
        seen = [(piece.content, ticks) async for piece in model.astream("x")]
        assert "".join(str(text) for text, _ in seen) == "z" * 40
        assert seen[0][1] < seen[20][1] < seen[-1][1]
    else:
        assert (await model.ainvoke("x")).content == "z" * 40
    ticking.cancel()
    assert ticks > 20


async def test_cancelling_a_task_or_leaving_a_stream_stops_the_decode() -> None:
    model = slow("z" * 200)
    task = asyncio.create_task(model.ainvoke("x"))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream: Any = model.astream("x")
    assert (await anext(stream)).content == "z"
    await stream.aclose()
    await asyncio.sleep(0.05)
    count = len(model.engine.model.calls)  # type: ignore[arg-type]
    assert count < 60
    await asyncio.sleep(0.1)
    assert len(model.engine.model.calls) == count  # type: ignore[arg-type]


def test_an_llms_batch_shares_with_a_preference_and_an_error_per_item() -> None:
    tokenizer = byte_tokenizer()
    scripted: Any = SlowModel(tokenizer, ANSWERS)
    llm = AmuletLLM(amulet=Amulet(scripted, tokenizer))
    llm.invoke("q0")
    one = passes(llm)
    assert llm.batch([f"{question}\n" for question in QUESTIONS]) == list(ANSWERS.values())
    assert passes(llm) < one + 16
    result = llm.generate([f"{question}\n" for question in QUESTIONS])
    assert [row[0].text for row in result.generations] == list(ANSWERS.values())
    assert passes(llm) < one + 16


class Threads(BaseCallbackHandler):
    """Counts the threads there are while answers begin and end, and keeps the order of both."""

    def __init__(self) -> None:
        self.most = 0
        self.seen: set[int] = set()

    def _look(self, *_: Any, **__: Any) -> None:
        self.most = max(self.most, threading.active_count())
        self.seen.add(threading.get_ident())

    on_chat_model_start = on_llm_start = on_llm_end = _look


@pytest.mark.parametrize("way", ["batch", "generate", "batch_as_completed", "bound", "configured"])
def test_a_batch_of_two_hundred_stays_in_the_calling_thread(way: str) -> None:
    heard = Threads()
    before = threading.active_count()
    model: Any = scripted_chat("Hi", callbacks=[heard])
    inputs = ["x"] * 200
    if way == "generate":
        rows = model.generate([[HumanMessage(text)] for text in inputs]).generations
        answers = [row[0].text for row in rows]
    elif way == "batch_as_completed":
        answers = [answer.content for _, answer in model.batch_as_completed(inputs)]
    else:
        if way == "bound":
            model = model.with_config(tags=["t"]).bind(max_tokens=9)
        if way == "configured":
            model = model.configurable_fields(max_tokens=ConfigurableField(id="limit"))
        answers = [answer.content for answer in model.batch(inputs)]
    assert answers == ["Hi"] * 200
    assert heard.most <= before + 1  # the model's decode thread
    assert heard.seen == {threading.get_ident()}


def test_an_llms_batch_stays_in_the_calling_thread_too() -> None:
    heard = Threads()
    before = threading.active_count()
    tokenizer = byte_tokenizer()
    scripted: Any = ScriptedModel(tokenizer, "Hi")
    llm = AmuletLLM(amulet=Amulet(scripted, tokenizer), callbacks=[heard])
    assert llm.batch(["x\n"] * 50) == ["Hi"] * 50
    assert [answer for _, answer in llm.batch_as_completed(["x\n"] * 50)] == ["Hi"] * 50
    assert heard.most <= before + 1
    assert heard.seen == {threading.get_ident()}


class Interrupted(ScriptedModel):
    """Is interrupted in its tenth forward pass, as by Ctrl-C."""

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any
    ) -> CausalLMOutputWithPast:
        if len(self.calls) == 9:
            self.fail_with = KeyboardInterrupt()
        if len(self.calls) > 9:
            time.sleep(0.02)
        return super().forward(input_ids, past_key_values=past_key_values, **options)


@pytest.mark.parametrize("way", ["batch", "generate", "batch_as_completed", "llm.batch"])
@pytest.mark.parametrize("return_exceptions", [False, True])
def test_an_interrupt_ends_all_of_a_batch_at_once(way: str, return_exceptions: bool) -> None:
    tokenizer = byte_tokenizer()
    scripted: Any = Interrupted(tokenizer, "z" * 200)
    engine = Amulet(scripted, tokenizer)
    chat = ChatAmulet(amulet=engine)
    option: dict[str, Any] = {"return_exceptions": return_exceptions}
    calls: dict[str, Callable[[], Any]] = {
        "batch": lambda: chat.batch(["x"] * 6, **option),
        "batch_as_completed": lambda: list(chat.batch_as_completed(["x"] * 6, **option)),
        "generate": lambda: chat.generate([[HumanMessage("x")]] * 6),
        "llm.batch": lambda: AmuletLLM(amulet=engine).batch(["x"] * 6, **option),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[way]()
    time.sleep(0.1)
    count = len(scripted.calls)
    assert count < 14  # of 200: the steps that were under way
    assert engine.rows == 0
    assert engine.chat([{"role": "user", "content": "x"}], max_new_tokens=3).text == "zzz"


def test_a_limit_holds_for_what_is_decoded_ahead() -> None:
    model = slow({f"q{number}": "z" * 5 for number in range(6)})
    most = 0

    class Rows(BaseCallbackHandler):
        def on_llm_end(self, *_: Any, **__: Any) -> None:
            nonlocal most
            most = max(most, max((shape[0] for shape in model.engine.model.calls), default=0))

    model.batch([f"q{n}" for n in range(6)], {"max_concurrency": 2, "callbacks": [Rows()]})
    assert most == 2


def test_cached_answers_are_not_decoded_again_and_new_ones_are_kept() -> None:
    model = chat().model_copy(update={"cache": InMemoryCache()})
    model.invoke("q0")
    passes(model)
    assert [answer.content for answer in model.batch(QUESTIONS)] == list(ANSWERS.values())
    prefilled = [shape for shape in model.engine.model.calls if shape[1] > 1]
    assert sum(shape[0] for shape in prefilled) == 7
    passes(model)
    assert [answer.content for answer in model.batch(QUESTIONS)] == list(ANSWERS.values())
    assert passes(model) == 0


def test_answers_come_as_they_are_completed_and_an_early_end_stops_the_rest() -> None:
    model = slow({"long": "z" * 30, "short": "s", "": "m" * 200})
    order = [position for position, _ in model.batch_as_completed(["long", "short"])]
    assert sorted(order) == [0, 1]
    passes(model)
    answers = model.batch_as_completed(["short", "middle"])
    assert next(answers)[1].content == "s"
    answers.close()
    assert model.engine.rows == 0
    assert passes(model) < 10


def test_a_callbacks_own_call_does_not_take_what_is_under_way() -> None:
    model = scripted_chat({"q0": "zero", "q1": "one", "": "else"})

    class Asks(BaseCallbackHandler):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            self.heard.append(other.invoke("q0").content)

    other = scripted_chat({"q0": "the other's"})
    asks = Asks()
    answers = model.batch(["q0", "q1"], {"callbacks": [asks]})
    assert [answer.content for answer in answers] == ["zero", "one"]
    assert asks.heard == ["the other's"] * 2


async def test_tokens_of_a_batch_reach_streaming_callbacks() -> None:
    model = scripted_chat({"q0": "zero", "q1": "one"}, streaming=True)

    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_llm_new_token(self, token: str, **_: Any) -> None:
            self.heard.append(token)

    tokens = Tokens()
    model.batch(["q0", "q1"], {"callbacks": [tokens]})
    assert "".join(tokens.heard) == "zeroone"


def test_any_iterable_of_inputs_and_one_bad_one_among_them() -> None:
    model = chat()
    given: Any = (question for question in QUESTIONS)
    assert [answer.content for answer in model.batch(given)] == list(ANSWERS.values())
    odd: Any = ["q0", object(), [("image", "x")], "q1"]
    answers = model.batch(odd, return_exceptions=True)
    assert [getattr(answer, "content", None) for answer in answers] == [
        *(ANSWERS["q0"], None, None, ANSWERS["q1"]),
    ]
