"""Many callers share one engine: nobody loses a token, whoever stops, fails or is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from amulet.driver import Driver
from amulet.engine import Engine
from amulet.errors import DecodeError, InterruptedDecodeError
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


def finish(driver: Driver, generation: Generation) -> str:
    while True:
        driver.advance(generation, len(generation.token_ids))
        if generation.done:
            break
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
    driver.advance(stopped, 0)
    driver.submit(waiting)
    driver.cancel(stopped)
    driver.cancel(waiting)
    assert (stopped.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    assert (engine.running, engine.cache_bytes) == ([], 0)
    calls = len(model.calls)
    driver.advance(waiting, 0)
    assert len(model.calls) == calls


def test_a_failed_step_reaches_everyone_in_it_and_the_next_call_works(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(Engine(model), max_rows=64)
    first, second = make(), make()
    for generation in (first, second):
        driver.submit(generation)
    driver.advance(second, 0)
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
    driver.advance(going, 0)
    model.fail_with = torch.OutOfMemoryError("no room")
    driver.submit(newcomer)
    with pytest.raises(DecodeError, match="2 rows"):
        driver.advance(newcomer, 0)
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
        driver.advance(mine, 0)
    model.fail_with = KeyboardInterrupt()
    if when == "prefill":
        driver.submit(mine)
    with pytest.raises(KeyboardInterrupt):
        finish(driver, mine)
    driver.cancel(mine)
    assert finish(driver, other) == TEXT


def test_an_interrupt_while_tokens_are_handed_over_ends_the_batch_cleanly(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    def interrupt(token_id: int) -> bool:
        raise KeyboardInterrupt

    engine = Engine(model)
    driver = Driver(engine, max_rows=64)
    other = make()
    driver.submit(other)
    driver.advance(other, 0)
    mine = make(on_token=interrupt)
    driver.submit(mine)
    with pytest.raises(KeyboardInterrupt):
        finish(driver, mine)
    with pytest.raises(InterruptedDecodeError, match="send the request again"):
        finish(driver, other)
    later = make()
    driver.submit(later)
    assert finish(driver, later) == TEXT


def test_a_slow_reader_does_not_hold_up_the_others(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(Engine(model), max_rows=64)
    slow, quick = make(), make()
    driver.submit(slow)
    driver.advance(slow, 0)
    driver.submit(quick)
    assert finish(driver, quick) == TEXT
    assert len(slow.token_ids) >= len(TEXT), "it was carried along"
    assert finish(driver, slow) == TEXT


def test_one_thread_runs_the_steps_until_its_answer_ends(
    model: ScriptedModel, make: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread that computes would have its own OpenMP helpers, and too many are slow ones."""
    monkeypatch.setattr("amulet.driver.PATIENCE", 60.0)
    engine = Engine(model)
    driver = Driver(engine, max_rows=64)
    runners: list[int] = []
    step = engine.step

    def recorded() -> None:
        runners.append(threading.get_ident())
        step()

    monkeypatch.setattr(engine, "step", recorded)
    generations = [make(max_new_tokens=n) for n in (8, 12, 16, 20)]
    for generation in generations:
        driver.submit(generation)
    threads = [threading.Thread(target=finish, args=(driver, one)) for one in generations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(generation.done for generation in generations)
    changes = sum(one != other for one, other in pairwise(runners))
    assert changes <= 3  # only where the runner's own answer was over


def test_a_runner_that_stays_away_is_not_waited_for(
    model: ScriptedModel, make: Callable[..., Generation]
) -> None:
    driver = Driver(Engine(model), max_rows=64)
    mine, other = make(), make()
    driver.submit(mine)
    driver.submit(other)
    driver.advance(mine, 0)  # this thread ran the step, and reads no further
    thread = threading.Thread(target=finish, args=(driver, other))
    thread.start()
    thread.join(timeout=60)
    assert other.done
    assert finish(driver, mine) == TEXT
