"""Many callers share one engine: nobody loses a token, whoever stops, fails or is interrupted."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from amulet.backends.transformers.backend import TransformersBackend
from amulet.decoding.generation import Generation
from amulet.decoding.worker import Driver
from amulet.errors import DecodeError, RequestError
from tests.engines import engine_over
from tests.models import ScriptedModel

TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> ScriptedModel:
    return ScriptedModel(tokenizer, TEXT)


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Generation]:
    def made(prompt: str = "Say it.\n", **options: object) -> Generation:
        end = frozenset({tokenizer.eos_token_id})
        return Generation(prompts=[tokenizer.encode(prompt)], end_ids=end, **options)  # type: ignore[arg-type]

    return made


def advance(driver: Driver, generation: Generation, known: int) -> None:
    driver.wait(generation, known)
    driver.check(generation)


def finish(driver: Driver, generation: Generation) -> str:
    while not generation.done:
        advance(driver, generation, len(generation.token_ids))
    driver.check(generation)
    return bytes(generation.token_ids[:-1]).decode()


def test_threads_share_their_steps(model: ScriptedModel, make: Callable[..., Generation]) -> None:
    engine = engine_over(model)
    driver = Driver(engine, max_rows=64)
    generations = [make() for _ in range(8)]
    for generation in generations:
        driver.submit(generation)
    texts: dict[int, str] = {}

    def work(i: int) -> None:
        texts[i] = finish(driver, generations[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert texts == dict.fromkeys(range(8), TEXT)
    assert model.calls.count((8, 1)) == len(TEXT)
    assert engine.backend.nbytes == 0


def test_rows_beyond_the_limit_wait_their_turn(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=2)
    generations = [make() for _ in range(5)]
    for generation in generations:
        driver.submit(generation)
    assert [finish(driver, generation) for generation in generations] == [TEXT] * 5
    assert max(rows for rows, width in model.calls if width == 1) == 2


def test_a_generation_wider_than_the_limit_runs_alone(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=1)
    pair = make(weights=[2.0])
    pair.prompts = [pair.prompts[0], pair.prompts[0]]
    other = make()
    driver.submit(pair)
    driver.submit(other)
    assert finish(driver, other) == finish(driver, pair) == TEXT
    assert (3, 1) not in model.calls


def test_cancelling_frees_the_row_at_once_when_nobody_decodes(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    engine = engine_over(model)
    driver = Driver(engine, max_rows=64)
    stopped, waiting = make(), make()
    driver.submit(stopped)
    advance(driver, stopped, 0)
    driver.submit(waiting)
    driver.cancel(stopped)
    driver.cancel(waiting)
    assert (stopped.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    assert (engine.running, engine.backend.nbytes) == ([], 0)
    calls = len(model.calls)
    advance(driver, waiting, 0)
    assert len(model.calls) == calls


def test_a_failed_step_reaches_everyone_in_it_and_the_next_call_works(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    first, second = make(), make()
    for generation in (first, second):
        driver.submit(generation)
    advance(driver, second, 0)
    model.fail_with = RuntimeError("the device is on fire")
    errors = []
    for generation in (first, second):
        with pytest.raises(DecodeError, match="the device is on fire") as caught:
            finish(driver, generation)
        errors.append(caught.value)
    assert errors[0] is not errors[1], "one instance in two threads would mix their tracebacks"
    later = make()
    driver.submit(later)
    assert finish(driver, later) == TEXT


def test_a_failed_prefill_is_the_newcomers_alone(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    going, newcomer = make(), make()
    driver.submit(going)
    advance(driver, going, 0)
    model.fail_with = torch.OutOfMemoryError("no room")
    driver.submit(newcomer)
    with pytest.raises(DecodeError, match="2 rows"):
        advance(driver, newcomer, 0)
    assert finish(driver, going) == TEXT


@pytest.mark.parametrize("when", ["prefill", "step"])
def test_an_interrupt_hits_its_caller_and_the_others_go_on(
    model: ScriptedModel, make: Callable[..., Generation], when: str
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    mine, other = make(), make()
    driver.submit(other)
    if when == "step":
        driver.submit(mine)
        advance(driver, mine, 0)
    model.fail_with = KeyboardInterrupt()
    if when == "prefill":
        driver.submit(mine)
    with pytest.raises(KeyboardInterrupt):
        finish(driver, mine)
    driver.cancel(mine)
    assert finish(driver, other) == TEXT


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_a_callback_raises_is_its_own_callers(
    model: ScriptedModel, make: Callable[..., Generation], raised: type[BaseException]
) -> None:
    def fail(token_id: int) -> bool:
        raise raised

    driver = Driver(engine_over(model), max_rows=64)
    other, mine = make(), make(on_token=fail)
    driver.submit(other)
    advance(driver, other, 0)
    driver.submit(mine)
    with pytest.raises(DecodeError, match=raised.__name__):
        finish(driver, mine)
    assert finish(driver, other) == TEXT


def test_a_slow_reader_does_not_hold_up_the_others(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    slow, quick = make(), make()
    driver.submit(slow)
    advance(driver, slow, 0)
    driver.submit(quick)
    assert finish(driver, quick) == TEXT
    assert len(slow.token_ids) >= len(TEXT), "it was carried along"
    assert finish(driver, slow) == TEXT


def test_all_engines_of_a_model_share_one_thread(
    model: ScriptedModel, make: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    forward = model.forward

    @functools.wraps(forward)
    def recorded(*args: Any, **options: Any) -> Any:
        threads.add(threading.get_ident())
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", recorded)
    drivers = [Driver(engine_over(model), max_rows=rows) for rows in (1, 2)]
    generations = [make() for _ in drivers]
    for driver, generation in zip(drivers, generations, strict=True):
        driver.submit(generation)
    readers = [
        threading.Thread(target=finish, args=pair)
        for pair in zip(drivers, generations, strict=True)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=60)
    assert all(generation.done for generation in generations)
    assert len(threads) == 1
    assert threads.isdisjoint({threading.get_ident(), *(reader.ident for reader in readers)})


def test_one_driver_serves_all_who_ask_alike(model: ScriptedModel) -> None:
    def backend() -> TransformersBackend:
        return TransformersBackend(model)

    driver = Driver.of(model, backend, 64, 0, True, False)
    assert Driver.of(model, backend, 64, 0, True, False) is driver
    assert Driver.of(model, backend, 64, 1, True, False) is not driver
    assert Driver.of(model, backend, 64, 0, True, True) is not driver


def test_the_thread_ends_with_its_drivers(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    generation = make()
    driver.submit(generation)
    assert finish(driver, generation) == TEXT
    thread = driver._thread._thread
    assert thread is not None
    assert thread.is_alive()
    del driver
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_the_decode_thread_does_not_wait_for_itself(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    inner = make()

    def ask(token_id: int) -> bool:
        driver.submit(inner)
        driver.wait(inner, 0)
        return False

    outer = make(on_token=ask)
    driver.submit(outer)
    driver.wait(outer, 0)
    assert isinstance(outer.error, RequestError)
    assert "use another model" in str(outer.error)


def test_a_cancel_never_comes_between_a_token_and_its_text(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    for _ in range(50):
        driver = Driver(engine_over(model), max_rows=64)
        seen: list[int] = []

        def slowly(token_id: int, seen: list[int] = seen) -> bool:
            time.sleep(0.0005)
            seen.append(token_id)
            return False

        generation = make(on_token=slowly)
        driver.submit(generation)
        driver.watch(generation, lambda: None)
        time.sleep(0.003)
        driver.cancel(generation)
        assert generation.token_ids == seen
        time.sleep(0.002)
        assert generation.token_ids == seen, "a token came after the end"


def test_a_step_waits_for_a_reader(model: ScriptedModel, make: Callable[..., Generation]) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    generation = make()
    driver.submit(generation)
    time.sleep(0.05)
    assert model.calls == []
    advance(driver, generation, 0)
    time.sleep(0.05)
    assert len(model.calls) == 1


def test_a_forked_child_decodes_and_the_parent_goes_on() -> None:
    script = """
import os
from amulet import Amulet, DecodeError
from tests.models import byte_tokenizer, random_model

amulet = Amulet(random_model("llama"), byte_tokenizer())
said = amulet.complete("hi", max_new_tokens=8).token_ids
half = amulet.stream_complete("hi", max_new_tokens=200)
next(half)
child = os.fork()
if child == 0:
    try:
        half.read()
    except DecodeError as error:
        assert "forked" in str(error), error
        os._exit(0 if amulet.complete("hi", max_new_tokens=8).token_ids == said else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
half.close()
assert amulet.complete("hi", max_new_tokens=8).token_ids == said
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_answer_cancelled_while_rows_move_leaves_none_behind(
    tokenizer: PreTrainedTokenizerFast,
    make: Callable[..., Generation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ScriptedModel(tokenizer, {"same words": TEXT, "": "another answer"})
    engine = engine_over(model, prefix_bytes=2**20)
    first, moved = make(), make("The same words, once more.\n")
    for generation in (first, moved):
        engine.admit(generation)
    copy_row = engine.backend._cache.copy_row

    def cancelled_meanwhile(*args: int) -> None:
        copy_row(*args)
        moved.finish_reason = "cancelled"

    monkeypatch.setattr(engine.backend._cache, "copy_row", cancelled_meanwhile)
    engine.retire(first)
    engine.sweep()
    assert engine.backend.nbytes == 0
    monkeypatch.undo()
    again = make("The same words, once more.\n")
    engine.admit(again)  # it would take over what a row of the other had
    while not again.done:
        engine.step()
    assert bytes(again.token_ids[:-1]).decode() == TEXT


def test_an_interrupt_while_rows_move_harms_no_other_answer(
    model: ScriptedModel, make: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_over(model)
    driver = Driver(engine, max_rows=64)
    stopped, other = make(), make()
    for generation in (stopped, other):
        driver.submit(generation)
    advance(driver, other, 0)

    def interrupted(*args: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.backend._cache, "copy_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        driver.cancel(stopped)
    monkeypatch.undo()
    assert finish(driver, other) == TEXT
    assert (engine.running, engine.backend.nbytes) == ([], 0)


def test_a_step_that_fails_leaves_a_cancelled_answer_cancelled(
    model: ScriptedModel, make: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    stopped, other = make(), make()
    for generation in (stopped, other):
        driver.submit(generation)
    advance(driver, other, 0)
    forward = model.forward

    @functools.wraps(forward)
    def failing(*args: Any, **options: Any) -> Any:
        driver.cancel(stopped)
        raise ValueError("broken")

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(DecodeError, match="broken"):
        finish(driver, other)
    assert (stopped.finish_reason, stopped.error) == ("cancelled", None)


def test_rows_that_can_not_be_moved_fail_their_answers(
    model: ScriptedModel, make: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_over(model)
    driver = Driver(engine, max_rows=64)

    def lost(*args: int) -> None:
        raise RuntimeError("the device is lost")

    stopped, other, late = make(), make(), make()
    for generation in (stopped, other):
        driver.submit(generation)
    advance(driver, other, 0)
    forward = model.forward

    @functools.wraps(forward)
    def cancelling(*args: Any, **options: Any) -> Any:
        driver.cancel(stopped)  # its row is then the first that the others' move to
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", cancelling)
    monkeypatch.setattr(engine.backend._cache, "copy_row", lost)
    driver.submit(late)
    reader = threading.Thread(target=driver.wait, args=(other, sys.maxsize), daemon=True)
    reader.start()
    reader.join(timeout=10)
    assert not reader.is_alive()
    with pytest.raises(DecodeError, match="the device is lost"):
        driver.check(other)
    monkeypatch.undo()
    again = make()
    driver.submit(again)
    assert finish(driver, again) == TEXT


def test_a_stream_collected_while_another_waits_does_not_lock_up(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    generation, dropped = make(), make()
    for each in (generation, dropped):
        driver.submit(each)

    def collect(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename == threading.__file__ and frame.f_code.co_name == "wait":
            sys.settrace(None)
            time.sleep(0.3)  # the decode thread has a token by now
            driver.cancel(dropped)  # as its `__del__` does
            return None
        return collect

    def read() -> None:
        sys.settrace(collect)
        driver.wait(generation, 0)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=10)
    assert not reader.is_alive()


PREFILLING = """
import functools, os, threading, time
from amulet import Amulet, DecodeError
from tests.models import ScriptedModel, byte_tokenizer

model = ScriptedModel(byte_tokenizer(), "hello there")
amulet = Amulet(model, byte_tokenizer())
forward, inside, go = model.forward, threading.Event(), threading.Event()

@functools.wraps(forward)
def held(*args, **options):
    inside.set()
    go.wait(20)
    return forward(*args, **options)

model.forward = held
stream = amulet.stream_complete("x")
replies = []
reader = threading.Thread(target=lambda: replies.append(stream.read()), daemon=True)
reader.start()
inside.wait()
"""


@pytest.mark.parametrize(
    "script",
    [
        """
child = os.fork()
go.set()
if child == 0:
    try:
        stream.read()
    except DecodeError as error:
        assert "forked" in str(error), error
        assert amulet.complete("y").text == "hello there"
        begun = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - begun < 0.3, "the decode thread is busy with nothing"
        os._exit(0)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
reader.join()
assert replies[0].text == "hello there"
""",
        """
from amulet.decoding.worker import _end_threads

threading.Timer(0.2, go.set).start()
_end_threads()  # as at the interpreter's exit
reader.join(20)
assert replies[0].finish_reason == "cancelled"
assert len(model.calls) == 1
""",
    ],
    ids=["fork", "exit"],
)
def test_a_prompt_in_prefill_ends_with_its_process(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREFILLING + script],
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_first_tokens_arrive_before_later_prompts_are_computed(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(engine_over(model), max_rows=64)
    generations = [make("x" * 600 + "\n", max_new_tokens=1) for _ in range(3)]
    passes: dict[int, int] = {}  # by generation: how many there had been when its token arrived
    for generation in generations:
        driver.submit(generation)
    with driver._changed:  # nothing is decoded until all of them are watched
        for i, generation in enumerate(generations):
            driver.watch(generation, lambda i=i: passes.setdefault(i, len(model.calls)))
    for generation in generations:
        finish(driver, generation)
    assert passes == {0: 2, 1: 4, 2: 6}  # 601 tokens are two passes


def test_running_answers_are_read_while_a_long_prompt_is_prefilled(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    engine = engine_over(model)
    engine.backend.chunk = 20
    driver = Driver(engine, max_rows=64)
    running = make()
    driver.submit(running)
    advance(driver, running, 0)
    heard: list[tuple[int, int]] = []  # tokens there, passes of the long prompt before
    long = make("x" * 100 + "\n", max_new_tokens=1)
    driver.submit(long)

    def hear() -> None:
        passes = sum(width > 1 for _, width in model.calls[1:])
        heard.append((len(running.token_ids), passes))

    driver.watch(running, hear)
    finish(driver, long)
    finish(driver, running)
    # 101 tokens are six passes of up to 20, and a step of the running answer before each.
    assert heard[:7] == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4), (7, 5)]


@pytest.mark.parametrize("error", [ValueError("broken"), torch.OutOfMemoryError("no room")])
def test_prompts_whose_common_prefill_fails_are_prefilled_one_by_one(
    model: ScriptedModel, make: Callable[..., Generation], error: Exception
) -> None:
    engine = engine_over(model)
    driver = Driver(engine, max_rows=64)
    generations = [make() for _ in range(3)]
    for generation in generations:
        driver.submit(generation)
    model.fail_with = error
    assert [finish(driver, generation) for generation in generations] == [TEXT] * 3
    assert model.calls[:4] == [(3, 8), (1, 8), (1, 8), (1, 8)]
    assert engine.backend.nbytes == 0


def test_streams_collected_while_the_queue_is_read_harm_no_other_answer(
    tokenizer: PreTrainedTokenizerFast, make: Callable[..., Generation]
) -> None:
    def cancelled_before(line: int) -> bool:
        driver = Driver(engine_over(ScriptedModel(tokenizer, TEXT)), max_rows=64)
        running, kept, *dropped = [make() for _ in range(4)]
        left = 0

        def collect(frame: Any, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code is Driver._next_waiting.__code__ and event == "line" and left:
                left -= 1
                if not left:
                    for generation in dropped:
                        driver.cancel(generation)  # as a stream's `__del__` does
            return collect if frame.f_code is Driver._next_waiting.__code__ else None

        threading.settrace(collect)
        try:
            driver.submit(running)
            advance(driver, running, 0)
        finally:
            threading.settrace(None)  # type: ignore[arg-type]
        with driver._changed:
            for generation in (dropped[0], kept, dropped[1]):
                driver.submit(generation)
            left = line
        assert [finish(driver, generation) for generation in (running, kept)] == [TEXT] * 2
        return not left

    assert all(map(cancelled_before, range(1, 20)))
