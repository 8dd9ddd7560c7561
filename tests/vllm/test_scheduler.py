"""The scheduler alone, with a worker that only counts: rows stay together whatever happens."""

from __future__ import annotations

import copy
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from amulet.errors import ModelError
from amulet.vllm_backend.scheduler import PairScheduler, check_config, pair_scheduler
from amulet.vllm_backend.wire import PAIR, ROW, Pair
from tests.vllm.folders import save_model

BLOCK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def config(folder: Path) -> VllmConfig:
    return EngineArgs(
        model=str(folder), dtype="float32", max_model_len=96, max_num_seqs=6
    ).create_engine_config()


def make_scheduler(
    given: VllmConfig,
    *,
    blocks: int,
    is_async: bool = False,
    stages: int = 1,
    caching: bool = True,
    **options: Any,
) -> PairScheduler:
    config = copy.deepcopy(given)
    for name, value in {"async_scheduling": is_async, **options}.items():
        setattr(config.scheduler_config, name, value)
    config.parallel_config.pipeline_parallel_size = stages
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = blocks
    config.cache_config.enable_prefix_caching = caching
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    return pair_scheduler(
        config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


init_none_hash(sha256)
HASHER = get_request_block_hasher(BLOCK, sha256)


def make_request(
    name: str, prompts: list[list[int]], answer: int, stop: int | None = None, priority: int = 0
) -> Request:
    pair = Pair(prompts[1:], [1.0] * (len(prompts) - 1)).args() if len(prompts) > 1 else None
    params = SamplingParams(
        max_tokens=answer, stop_token_ids=[] if stop is None else [stop], extra_args=pair
    )
    params.update_from_generation_config({}, eos_token_id=None)
    return Request(
        request_id=name,
        prompt_token_ids=prompts[0],
        sampling_params=params,
        pooling_params=None,
        block_hasher=HASHER,
        priority=priority,
    )


class Worker:
    """Samples 0, 1, 2, ... for every request, and looks on."""

    def __init__(self, scheduler: PairScheduler) -> None:
        self.scheduler = scheduler
        self.made: dict[str, int] = {}
        self.told: dict[str, list[int]] = {}
        self.ended: dict[str, Any] = {}
        self.flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.preemptions = 0

    def step(self, ahead: int = 0) -> None:
        """Schedule a step, and take the tokens of the one that is `ahead` steps back."""
        scheduler = self.scheduler
        output = scheduler.schedule()
        self.preemptions += len(output.preempted_req_ids or ())
        names = list(output.num_scheduled_tokens)
        tokens = []
        sampling: dict[str, list[int]] = {}
        for name in names:
            row = scheduler.requests[name]
            if row.is_prefill_chunk:
                tokens.append([])
                continue
            number = self.made[name] = self.made.get(name, -1) + 1
            tokens.append([number])
            args = row.sampling_params.extra_args
            if args and ROW in args:
                group = args[ROW]
                sampling.setdefault(group["request"], [group["count"]]).append(number)
        for count, *numbers in sampling.values():
            assert len(numbers) == count  # all rows choose, or none
            assert len(set(numbers)) == 1  # and all the same token of the answer
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=tokens,
            logprobs=None,
            prompt_logprobs_dict={},
            prompt_token_id_logprobs_dict={},
            pooler_output=[],
        )
        self.flight.append((output, result))
        if len(self.flight) > ahead:
            self.take()

    def take(self) -> None:
        output, result = self.flight.popleft()
        for given in self.scheduler.update_from_output(output, result).values():
            for one in given.outputs:
                assert "#" not in one.request_id
                self.told.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.ended[one.request_id] = one.finish_reason


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("engine", ["plain", "async", "pipeline"])
def test_random_traffic(config: VllmConfig, policy: str, engine: str) -> None:
    preemptions = 0
    for seed in range(60):
        rng = random.Random(seed)
        scheduler = make_scheduler(
            config,
            blocks=rng.choice((26, 40, 90)),
            is_async=engine == "async",
            stages=2 if engine == "pipeline" else 1,
            policy=policy,
            max_num_batched_tokens=rng.choice((8, 17, 64)),
            long_prefill_token_threshold=rng.choice((0, 0, 9)),
            caching=rng.random() < 0.7,
            scheduler_reserve_full_isl=rng.random() < 0.5,
            watermark=rng.choice((0.0, 0.1)),
        )
        preemptions += run_random_traffic(scheduler, rng, ahead=int(engine != "plain"))
    assert preemptions > 50


def run_random_traffic(scheduler: PairScheduler, rng: random.Random, ahead: int) -> int:
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    worker = Worker(scheduler)
    common = [rng.randrange(200) for _ in range(40)]
    answers: dict[str, int] = {}
    aborted: set[str] = set()
    left = [f"r{i}" for i in range(30)]
    idle = 0
    while left or scheduler.has_unfinished_requests():
        if left and rng.random() < 0.4:
            name = left.pop(0)
            rows = rng.choice((1, 1, 2, 2, 2, 3))
            prompts = []
            for _ in range(rows):
                shared = common[: rng.randrange(0, 30)]
                own = [rng.randrange(200) for _ in range(rng.randrange(1, 12))]
                prompts.append(shared + own)
            answer = rng.randrange(1, 20)
            stop = rng.randrange(25)
            request = make_request(name, prompts, answer, stop, rng.randrange(3))
            scheduler.add_request(request)
            # A small cache may have no room for the rows, or for all of the answer.
            if name not in scheduler._failed:
                answers[name] = min(request.max_tokens, stop + 1)
        if answers and rng.random() < 0.03:
            name = rng.choice(list(answers))
            if name not in worker.ended:
                aborted.add(name)
                scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        before = len(worker.ended) + sum(map(len, worker.told.values()))
        computed = sum(row.num_computed_tokens for row in scheduler.requests.values())
        worker.step(ahead)
        after = len(worker.ended) + sum(map(len, worker.told.values()))
        again = sum(row.num_computed_tokens for row in scheduler.requests.values())
        stands = before == after and computed == again and scheduler.has_unfinished_requests()
        idle = idle + 1 if stands else 0
        assert idle < 10, "nothing moves any more"
    while worker.flight:
        worker.take()
    assert not scheduler.requests
    assert not scheduler._groups
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    for name, count in answers.items():
        told = worker.told.get(name, [])
        assert told == list(range(len(told)))
        if name not in aborted:
            assert len(told) == count, worker.ended[name]
    return worker.preemptions


def run(scheduler: PairScheduler, *requests: Request) -> Worker:
    worker = Worker(scheduler)
    for request in requests:
        scheduler.add_request(request)
    for _ in range(400):
        if not scheduler.has_unfinished_requests():
            return worker
        worker.step()
    raise AssertionError("it does not end")


def test_short_prompts_choose_at_once(config: VllmConfig) -> None:
    scheduler = make_scheduler(config, blocks=40, max_num_batched_tokens=64)
    worker = Worker(scheduler)
    scheduler.add_request(make_request("a", [[1, 2, 3], [4, 5], [6]], 3))
    worker.step()
    assert worker.told == {"a": [0]}


def test_what_the_prompts_share_is_held_once(config: VllmConfig) -> None:
    scheduler = make_scheduler(config, blocks=40, max_num_batched_tokens=96)
    worker = Worker(scheduler)
    shared = list(range(60))
    scheduler.add_request(make_request("a", [[*shared, 1, 2], [*shared, 3]], 2))
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    worker.step()
    used = free - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert used == 60 // BLOCK + 2


def test_a_pair_that_fits_only_by_what_it_shares_is_admitted(config: VllmConfig) -> None:
    scheduler = make_scheduler(config, blocks=40, max_num_batched_tokens=96)
    shared = list(range(70))
    other = make_request("plain", [list(range(100, 160))], 8)
    worker = run(scheduler, other, make_request("a", [[*shared, 1, 2], [*shared, 3]], 4))
    assert worker.told["a"] == [0, 1, 2, 3]


def test_an_answer_is_cut_where_the_rows_no_longer_fit(config: VllmConfig) -> None:
    scheduler = make_scheduler(config, blocks=21, max_num_batched_tokens=64)
    worker = run(scheduler, make_request("a", [list(range(30)), list(range(100, 130))], 60))
    assert len(worker.told["a"]) == 10  # 20 blocks of 4 for two rows of 30 + 10
    assert str(worker.ended["a"]) == "length"


@pytest.mark.parametrize(
    ("prompts", "blocks"),
    [
        ([list(range(60)), list(range(60, 120))], 21),  # more than the cache holds
        ([[i] * 3 for i in range(7)], 90),  # more rows than --max-num-seqs
        ([[1], list(range(90))], 90),  # one token, and more than a step reads
    ],
)
def test_what_can_never_run_fails_and_the_rest_goes_on(
    config: VllmConfig, prompts: list[list[int]], blocks: int
) -> None:
    scheduler = make_scheduler(config, blocks=blocks, max_num_batched_tokens=64)
    worker = run(scheduler, make_request("bad", prompts, 5), make_request("good", [[1, 2]], 5))
    assert str(worker.ended["bad"]) == "error"
    assert worker.told["good"] == [0, 1, 2, 3, 4]


def test_a_reset_of_the_cache_keeps_pairs_together(config: VllmConfig) -> None:
    scheduler = make_scheduler(config, blocks=60, max_num_batched_tokens=64)
    worker = Worker(scheduler)
    for name in "abc":
        scheduler.add_request(make_request(name, [[1, 2, 3, 4, 5], [6, 7]], 9))
    for step in range(40):
        if step == 4:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        worker.step()
    assert worker.told == {name: list(range(9)) for name in "abc"}


def test_rows_carry_no_prompts_and_no_sampling_of_vllms(config: VllmConfig) -> None:
    scheduler = make_scheduler(config, blocks=40, max_num_batched_tokens=64)
    scheduler.add_request(make_request("a", [[1, 2], [3, 4]], 3))
    rows = list(scheduler.requests.values())
    assert [row.request_id for row in rows] == ["a", "a#1"]
    for number, row in enumerate(rows):
        assert row.sampling_params.temperature == 0
        assert PAIR not in row.sampling_params.extra_args
        carried = row.sampling_params.extra_args[ROW]
        assert carried["number"] == number
        assert carried["temperature"] == 1.0
        assert carried["pair"]["prompts"] == []
    assert rows[0].sampling_params.extra_args[ROW]["seed"] == carried["seed"]


def test_speculative_decoding_is_refused(folder: Path) -> None:
    draft = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    arguments = EngineArgs(model=str(folder), max_model_len=96, speculative_config=draft)
    config = arguments.create_engine_config()
    with pytest.raises(ModelError, match="speculative"):
        check_config(config)
