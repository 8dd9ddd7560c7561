"""`amulet plan` against vLLM's own numbers: blocks in a memory, and blocks that a request takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from amulet.plan.costs import Work, vllm_block_bytes, vllm_blocks, vllm_users
from amulet.plan.shapes import find_shape
from amulet.vllm_backend.wire import Pair
from tests.vllm.engines import scheduler, start_engine, translate
from tests.vllm.folders import save_model

BLOCK = 32  # tokens; see `start_engine`
MEMORY = 2**30  # VLLM_CPU_KVCACHE_SPACE, see conftest.py
WINDOW = 1024
ANSWER = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama", window=WINDOW)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LLM]:
    started = start_engine(folder, max_model_len=WINDOW, max_num_seqs=8)
    yield started
    started.llm_engine.engine_core.shutdown()


def test_the_number_of_blocks(engine: LLM, folder: Path) -> None:
    shape = find_shape(str(folder))
    blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert blocks == MEMORY // vllm_block_bytes(shape, "float32", block=BLOCK)
    whole_windows = Work(WINDOW - 24, 24, 0)
    users = vllm_users(shape, "float32", whole_windows, MEMORY, block=BLOCK)
    assert users == (blocks - 1) // (WINDOW // BLOCK)


def ask(
    engine: LLM,
    monkeypatch: pytest.MonkeyPatch,
    wishes: Sequence[str],
    placement: str,
    length: int,
) -> tuple[list[list[int]], int]:
    """Return the prompts of a request's rows, and how many blocks they took at the most."""
    name = f"{len(wishes)} {placement} {length} "
    request = {
        "messages": [{"role": "user", "content": name + "x" * (length - len(name))}],
        "preference": list(wishes) or None,
        "strength": 2.0,
        "placement": placement,
        "max_new_tokens": ANSWER,
    }
    prompt, params = translate(engine, request)
    params.ignore_eos = True
    pair = Pair.read(params.extra_args)
    rows = [prompt["prompt_token_ids"], *(pair.prompts if pair is not None else [])]
    own = scheduler(engine)
    pool = own.kv_cache_manager.block_pool
    free, most = pool.get_num_free_blocks(), 0
    schedule = own.schedule

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal most
        output = schedule(*args, **options)
        most = max(most, free - pool.get_num_free_blocks())
        return output

    monkeypatch.setattr(own, "schedule", watched)
    engine.generate([prompt], [params], use_tqdm=False)
    return rows, most


def shared(rows: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all rows have in common."""
    same = [len({*ids}) == 1 for ids in zip(*rows, strict=False)]
    return [*same, False].index(False)


def work_of(rows: list[list[int]]) -> Work:
    """Return what `amulet plan` is told of a request: its longest preference stands for all."""
    base = len(rows[-1])
    if len(rows) == 1:
        return Work(base, ANSWER, 0)
    *preferred, alone, _ = rows
    rows, preferences = [*preferred, rows[-1]], len(preferred)
    assert shared([alone, rows[-1]]) < BLOCK
    assert {shared(two) // BLOCK for two in combinations(rows, 2)} == {shared(rows) // BLOCK}
    longest = max(map(len, rows)) - base
    return Work(base, ANSWER, preferences, longest, shared(rows), len(alone))


@pytest.mark.parametrize("length", [90, 171, 300, 331])
@pytest.mark.parametrize("placement", ["system", "user"])
@pytest.mark.parametrize("wishes", [(), ("Be brief.",), ("Very brief.", "More brief.")])
def test_blocks_of_a_request(
    engine: LLM,
    monkeypatch: pytest.MonkeyPatch,
    wishes: tuple[str, ...],
    placement: str,
    length: int,
) -> None:
    rows, most = ask(engine, monkeypatch, wishes, placement, length)
    work = work_of(rows)
    assert sorted(work.rows) == sorted(len(ids) + ANSWER for ids in rows)
    assert most == vllm_blocks(work, BLOCK)


@pytest.mark.parametrize("placement", ["system", "user"])
def test_the_longest_preference_bounds_the_blocks_of_all(
    engine: LLM, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    wishes = ("Very brief.", "More than that: leave out whatever the question does not ask for.")
    rows, most = ask(engine, monkeypatch, wishes, placement, 240)
    work = work_of(rows)
    shortest = replace(work, preference_tokens=min(map(len, rows[:-2])) - len(rows[-1]))
    assert vllm_blocks(shortest, BLOCK) < most < vllm_blocks(work, BLOCK)
