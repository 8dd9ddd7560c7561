"""`amulet plan` against vLLM's own numbers: blocks in a memory, and blocks that a pair takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from amulet.plan.costs import Work, vllm_block_bytes, vllm_blocks, vllm_users
from amulet.plan.shapes import find_shape
from amulet.vllm_backend.wire import Pair
from tests.vllm.engines import scheduler, start_engine, translate
from tests.vllm.folders import save_model

BLOCK = 32  # tokens; the engine's on a CPU
MEMORY = 2**30  # VLLM_CPU_KVCACHE_SPACE
ANSWER = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama", window=1024)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LLM]:
    started = start_engine(folder, max_model_len=1024, max_num_seqs=8)
    yield started
    started.llm_engine.engine_core.shutdown()


def test_the_number_of_blocks(engine: LLM, folder: Path) -> None:
    blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert blocks == MEMORY // vllm_block_bytes(find_shape(str(folder)), "float32", block=BLOCK)


def test_whole_windows_that_fit(engine: LLM, folder: Path) -> None:
    work = Work(1000, 24, 0)
    users = vllm_users(find_shape(str(folder)), "float32", work, MEMORY, block=BLOCK)
    blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert users == (blocks - 1) // (1024 // BLOCK)


@pytest.mark.parametrize("placement", ["system", "user"])
@pytest.mark.parametrize("preferences", [0, 1, 2])
def test_blocks_of_a_pair(engine: LLM, preferences: int, placement: str) -> None:
    request = {
        "messages": [{"role": "user", "content": f"{preferences} {placement} " + "x" * 300}],
        "preference": ["Be very brief.", "Be as brief."][:preferences] or None,
        "placement": placement,
        "max_new_tokens": ANSWER,
    }
    prompt, params = translate(engine, request)
    params.ignore_eos = True
    pair = Pair.read(params.extra_args)
    rows = [prompt["prompt_token_ids"], *(pair.prompts if pair is not None else [])]
    base = rows[-1]
    shared = (
        next(i for i, ids in enumerate(zip(*rows, strict=False)) if len({*ids}) > 1)
        if (preferences)
        else 0
    )
    work = Work(len(base), ANSWER, preferences, len(rows[0]) - len(base), shared)
    assert sorted(work.rows) == sorted(len(ids) + ANSWER for ids in rows)
    pool = scheduler(engine).kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    engine.llm_engine.add_request(f"{preferences} {placement}", prompt, params)
    most = 0
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
        most = max(most, free - pool.get_num_free_blocks())
    assert most == vllm_blocks(work, BLOCK)
