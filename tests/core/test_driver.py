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

from amulet.driver import Driver
from amulet.engine import Engine
from amulet.errors import DecodeError, RequestError
from amulet.generation import Generation
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
    engine = Engine(model)
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
    assert engine.cache_bytes == 0


def test_rows_beyond_the_limit_wait_their_turn(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(Engine(model), max_rows=2)
    generations = [make() for _ in range(5)]
    for generation in generations:
        driver.submit(generation)
    assert [finish(driver, generation) for generation in generations] == [TEXT] * 5
    assert max(rows for rows, width in model.calls if width == 1) == 2


def test_a_generation_wider_than_the_limit_runs_alone(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(Engine(model), max_rows=1)
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
    engine = Engine(model)
    driver = Driver(engine, max_rows=64)
    stopped, waiting = make(), make()
    driver.submit(stopped)
    advance(driver, stopped, 0)
    driver.submit(waiting)
    driver.cancel(stopped)
    driver.cancel(waiting)
    assert (stopped.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    assert (engine.running, engine.cache_bytes) == ([], 0)
    calls = len(model.calls)
    advance(driver, waiting, 0)
    assert len(model.calls) == calls


def test_a_failed_step_reaches_everyone_in_it_and_the_next_call_works(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(Engine(model), max_rows=64)
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
    driver = Driver(Engine(model), max_rows=64)
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
    driver = Driver(Engine(model), max_rows=64)
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

    driver = Driver(Engine(model), max_rows=64)
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
    driver = Driver(Engine(model), max_rows=64)
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
    drivers = [Driver(Engine(model), max_rows=rows) for rows in (1, 2)]
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
    driver = Driver.of(model, 64, 0, False, True)
    assert Driver.of(model, 64, 0, False, True) is driver
    assert Driver.of(model, 64, 1, False, True) is not driver


def test_the_thread_ends_with_its_drivers(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(Engine(model), max_rows=64)
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
    driver = Driver(Engine(model), max_rows=64)
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
        driver = Driver(Engine(model), max_rows=64)
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
    driver = Driver(Engine(model), max_rows=64)
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
