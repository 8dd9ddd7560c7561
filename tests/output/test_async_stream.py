"""The asyncio bridge: shared steps, no blocked loop, cancelling stops the decode."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, DecodeError, Event, Request, RequestError
from amulet.output.async_stream import AsyncReplyStream
from tests.models import ScriptedModel

LONG = "abcdefghijklmnopqrstuvwxyz" * 4


class SlowModel(ScriptedModel):
    """Takes ten milliseconds a step, without the GIL, as a real model does."""

    def _next(self, ids: list[int]) -> int:
        time.sleep(0.01)
        return super()._next(ids)


def amulet_saying(
    tokenizer: PreTrainedTokenizerFast, answers: Any, kind: type[ScriptedModel] = ScriptedModel
) -> tuple[Amulet, ScriptedModel]:
    model = kind(tokenizer, answers)
    return Amulet(model, tokenizer), model  # type: ignore[arg-type]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within five seconds")


async def test_the_async_twins_say_what_the_others_say(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet, _ = amulet_saying(tokenizer, {"hi": "héllo 😀", "": "other"})
    assert await amulet.achat(user("hi")) == amulet.chat(user("hi"))
    assert await amulet.acomplete("hi\n") == amulet.complete("hi\n")
    stream = amulet.astream(user("hi"))
    assert [piece async for piece in stream] == ["h", "é", "l", "l", "o", " ", "😀"]
    assert stream.reply == amulet.chat(user("hi"))
    events = [event async for event in amulet.astream_complete("hi\n", stop="o").events()]
    assert events == [Event("text", piece) for piece in "héll"]
    replies = await amulet.abatch([{"messages": user("hi")}, {"messages": user("x")}])
    assert [str(reply) for reply in replies] == ["héllo 😀", "other"]


async def test_concurrent_answers_share_forward_passes(tokenizer: PreTrainedTokenizerFast) -> None:
    said = [f"{word} {LONG}" for word in ("first", "other", "third")]
    answers = dict(zip(("one", "two", ""), said, strict=True))
    amulet, model = amulet_saying(tokenizer, answers, SlowModel)
    await asyncio.gather(amulet.achat(user("warm up"), max_new_tokens=1))
    model.calls.clear()
    replies = await amulet.abatch([{"messages": user(word)} for word in ("one", "two", "three")])
    assert [str(reply) for reply in replies] == said
    # The first may be decoding before the last is submitted; then they share the steps.
    assert model.calls.count((3, 1)) >= 3
    assert len(model.calls) < 2 * len(said[0])
    texts = await asyncio.gather(*(amulet.achat(user(word)) for word in ("one", "two", "three")))
    assert [reply.text for reply in texts] == said


async def test_the_first_token_is_there_before_the_last_is_decoded(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet, model = amulet_saying(tokenizer, LONG, SlowModel)
    stream = amulet.astream(user("hi"))
    assert await stream.__anext__() == "a"
    assert len(model.calls) < 20
    assert (await stream.read()).text == LONG


async def test_the_loop_runs_on_while_tokens_are_decoded(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet, _ = amulet_saying(tokenizer, LONG, SlowModel)
    longest, last = 0.0, time.perf_counter()
    task = asyncio.ensure_future(amulet.achat(user("hi")))
    ticks = 0
    while not task.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last, ticks = max(longest, now - last), now, ticks + 1
    assert task.result().text == LONG
    assert ticks > 100
    assert longest < 0.5


@pytest.mark.parametrize("how", ["cancel", "aclose", "break", "timeout"])
async def test_ending_early_stops_the_decode(tokenizer: PreTrainedTokenizerFast, how: str) -> None:
    amulet, model = amulet_saying(tokenizer, LONG, SlowModel)
    stream = amulet.astream(user("hi"))
    if how == "cancel":
        task = asyncio.ensure_future(stream.read())
        await until(lambda: len(model.calls) > 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif how == "timeout":
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(amulet.achat(user("hi")), 0.1)
    elif how == "aclose":
        assert await stream.__anext__() == "a"
        await stream.aclose()
        assert stream.reply.finish_reason == "cancelled"
        assert LONG.startswith(stream.reply.text)
    else:
        async with stream:
            async for piece in stream:
                assert piece == "a"
                break
    calls = len(model.calls)
    await until(lambda: amulet._engine.backend.nbytes == 0)
    await asyncio.sleep(0.05)
    assert len(model.calls) <= calls + 1


async def test_a_stream_that_is_dropped_stops_too(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet, _ = amulet_saying(tokenizer, LONG, SlowModel)
    stream = amulet.astream(user("hi"))
    assert await stream.__anext__() == "a"
    del stream
    await until(lambda: amulet._engine.running == [])


async def test_bad_input_and_failures_reach_the_caller(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet, model = amulet_saying(tokenizer, {"hi": "ok", "": LONG}, SlowModel)
    with pytest.raises(RequestError, match="temperature=-1"):
        amulet.astream(user("hi"), temperature=-1)
    with pytest.raises(RequestError, match="has role 'robot'"):
        await amulet.achat([{"role": "robot", "content": "x"}])
    with pytest.raises(RequestError, match="not finished"):
        _ = amulet.astream(user("hi")).reply
    other = asyncio.ensure_future(amulet.achat(user("other")))
    await until(lambda: amulet._engine.running)
    model.fail_with = ValueError("broken")
    with pytest.raises(DecodeError, match="broken"):
        await other
    assert str(await amulet.achat(user("hi"))) == "ok"
    requests: list[Any] = [{"messages": user("hi")}, {"messages": []}]
    first, second = await amulet.abatch(requests, return_exceptions=True)
    assert str(first) == "ok"
    assert isinstance(second, RequestError)
    with pytest.raises(RequestError, match="expected a list of messages, such as"):
        await amulet.abatch(requests)


def test_several_loops_and_threads_share_one_model(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet, _ = amulet_saying(tokenizer, {"one": "first", "two": "other", "": "third"})
    said: dict[str, str] = {}

    def in_a_loop(word: str) -> None:
        said[word] = asyncio.run(amulet.achat(user(word))).text

    threads = [threading.Thread(target=in_a_loop, args=(word,)) for word in ("one", "two", "six")]
    for thread in threads:
        thread.start()
    said["sync"] = amulet.chat(user("one")).text
    for thread in threads:
        thread.join(20)
    assert said == {"one": "first", "two": "other", "six": "third", "sync": "first"}


async def test_a_prepared_answer_is_queued_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet, model = amulet_saying(tokenizer, "hello")
    stream = amulet.prepare(Request(messages=tuple(user("hi"))))
    assert model.calls == []
    reader = amulet.astart(stream)
    await until(lambda: len(model.calls) == 6)  # nobody reads it, and it is decoded
    assert (await reader.read()).text == stream.text == "hello"


def test_a_loop_that_is_gone_ends_its_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet, model = amulet_saying(tokenizer, LONG, SlowModel)
    streams = []

    async def leave() -> None:
        streams.append(amulet.astream(user("hi")))
        assert await streams[0].__anext__() == "a"

    asyncio.run(leave())
    for _ in range(500):
        if not amulet._engine.running:
            break
        time.sleep(0.01)
    calls = len(model.calls)
    time.sleep(0.05)
    assert (amulet._engine.running, len(model.calls)) == ([], calls)
    assert torch.is_inference_mode_enabled() is False


def test_the_process_ends_cleanly_while_an_answer_is_decoded() -> None:
    """A thread inside PyTorch would abort the interpreter on its way down; not every time."""
    script = """
import asyncio, os, sys, warnings
from amulet import Amulet
from tests.models import byte_tokenizer, random_model

warnings.simplefilter("ignore", DeprecationWarning)  # of `fork` beside threads of libraries
for _ in range(2):  # three processes, of which the others need not import all of it
    if child := os.fork():
        ended = os.waitpid(child, 0)[1]
        assert ended == 0, ended
    else:
        break

amulet = Amulet(random_model("llama"), byte_tokenizer())

async def main() -> None:
    stream = amulet.astream([{"role": "user", "content": "hi"}], max_new_tokens=4000)
    await stream.__anext__()

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_decode_thread_ends_before_the_interpreter() -> None:
    """A thread that frees a model is inside PyTorch, too."""
    script = """
import atexit, threading

def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]

@atexit.register  # handlers run last in, first out, so this one before amulet's is registered
def at_the_very_end() -> None:
    print("at the end", names())

from amulet import Amulet
from tests.models import byte_tokenizer, random_model

amulet = Amulet(random_model("llama"), byte_tokenizer())
amulet.chat([{"role": "user", "content": "hi"}], max_new_tokens=3)
print("after the answer", names())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    after, end = done.stdout.splitlines()
    assert "amulet-decode" in after
    assert "amulet-decode" not in end


def test_a_stream_is_read_in_the_loop_that_started_it(tokenizer: PreTrainedTokenizerFast) -> None:
    model = ScriptedModel(tokenizer, "hello")
    amulet = Amulet(model, tokenizer)
    forward, go = model.forward, threading.Event()

    @functools.wraps(forward)
    def held(*args: Any, **options: Any) -> Any:
        go.wait(60)
        return forward(*args, **options)

    model.forward = held  # type: ignore[method-assign]

    async def start() -> AsyncReplyStream:
        return amulet.astart(amulet.prepare(Request(prompt="Hi")))

    stream = asyncio.run(start())
    with pytest.raises(RequestError, match="another event loop"):
        asyncio.run(asyncio.wait_for(stream.read(), 10))
    go.set()
    assert amulet.complete("Hi").text == "hello"
