"""A vLLM scheduler that keeps the rows of a steered request together.

Each row is an engine request with its own prompt and blocks; prefix caching shares the prompts'
common prefix. The rows are kept together as follows:

- they are admitted in one step, and only if there is room for all of them;
- a row whose prompt is read up to its last token waits there (`_reserve_prefill_lookahead`) for the
  others, so that all choose their first token in the same step; from then on each step has all of
  them or none;
- if one row is preempted, all are, and they return together;
- if one row ends, all end; only the first row's tokens leave the engine.

vLLM's `schedule` is not changed. It makes three decisions per request, which are overridden here:
how many tokens it gets, whether there are blocks, and what is preempted if there are none.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from amulet.errors import ModelError
from amulet.vllm_backend.version import check_vllm
from amulet.vllm_backend.wire import PAIR, Pair, Row

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

check_vllm()
logger = init_logger("vllm.amulet")


class Group:
    """The rows of a steered request: preferred rows, then the base row; the first is its own."""

    def __init__(self, rows: Sequence[Request]) -> None:
        self.rows = list(rows)

    @property
    def first(self) -> Request:
        """The row that is the client's request."""
        return self.rows[0]

    @property
    def is_running(self) -> bool:
        """Tells whether the rows are in the running batch."""
        return all(row.status == RequestStatus.RUNNING for row in self.rows)


@dataclass
class _StepPlan:
    """The decisions about a group in this step.

    Attributes:
        is_whole: every row takes all its remaining tokens, so a token is chosen; otherwise each
            row keeps one.
        is_held: no row takes any token.
        has_room: there are enough blocks for all rows.
    """

    is_whole: bool
    is_held: bool = False
    has_room: bool = False


class PairScheduler(Scheduler):
    """The scheduler of engines that wait for a step's tokens before they schedule the next."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **options: Any) -> None:
        check_config(vllm_config)
        super().__init__(vllm_config, *args, **options)
        self._groups: dict[str, Group] = {}  # by the ids of all their rows
        self._ended: list[Group] = []
        self._failed: set[str] = set()
        self._plans: dict[Group, _StepPlan] = {}
        self._spent = 0  # tokens assigned in this step
        self._allocating: Request | None = None
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate

    # ---- new requests ----

    def add_request(self, request: Request) -> None:
        """Queue a request; if it is steered, with all its rows."""
        params = request.sampling_params
        pair = None if params is None else Pair.read(params.extra_args)
        if pair is None or request.request_id in self.requests:
            super().add_request(request)
            return
        group = Group(_rows(request, pair))
        problem = self._limit(group)
        if problem:
            logger.error("Request %s: %s", request.request_id, problem)
            self._failed.add(request.request_id)
            group.rows = [request]
        for row in group.rows:
            self._groups[row.request_id] = group
            super().add_request(row)

    def _limit(self, group: Group) -> str:
        """Limit the answer to what fits; return an error message if nothing fits."""
        rows, count = group.rows, len(group.rows)
        if count > self.max_num_active_reqs:
            return f"{count} rows; --max-num-seqs allows {self.max_num_active_reqs}."
        shortest = min(row.num_prompt_tokens for row in rows)
        total = sum(row.num_prompt_tokens for row in rows)
        if shortest == 1 or not self.scheduler_config.enable_chunked_prefill:
            # No part of a one-token prompt can be read before the other prompts.
            step = one_step(self.scheduler_config)
            if total > step:
                return f"{total} prompt tokens must be read in one step, which has room for {step}."
        room = self.max_model_len - max(row.num_prompt_tokens for row in rows)
        limit = min(group.first.max_tokens, room)
        blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # vLLM reserves one

        def fits(answer: int) -> bool:
            needs = (self._blocks_for(row, row.num_prompt_tokens + answer) for row in rows)
            return sum(needs) <= blocks

        if limit >= 1 and not fits(limit):
            low, high = 0, limit
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            limit = low
        if limit < 1:
            return f"{total} prompt tokens in {count} rows leave no room for an answer."
        for row in rows:
            row.max_tokens = limit
        return ""

    # ---- steps ----

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        """Schedule the next step."""
        self._plans.clear()
        self._spent = 0
        if self.policy == SchedulingPolicy.PRIORITY:
            # Then the last request is preempted, as without priorities, and never one that has
            # its tokens already.
            self.running.sort(key=lambda row: (row.priority, row.arrival_time))
        try:
            output = super().schedule(*args, **options)
        finally:
            self._allocating = None
        self._check(output)
        return output

    def _plan(self, group: Group) -> _StepPlan:
        if (plan := self._plans.get(group)) is None:
            plan = self._plans[group] = self._new_plan(group)
        return plan

    def _new_plan(self, group: Group) -> _StepPlan:
        left = [_tokens_left(row) for row in group.rows]
        if not group.is_running:
            # Cached blocks of later rows may be evicted once the first row has its blocks.
            left[0] -= self._local_hit(group.first)[1]
        threshold = self.scheduler_config.long_prefill_token_threshold
        budget = self._budget
        if min(left) < 1:  # nothing to do until the last step's tokens arrive
            return _StepPlan(is_whole=False, is_held=True)
        if sum(left) <= budget and (not threshold or max(left) <= threshold):
            return _StepPlan(is_whole=True)
        if group.is_running:
            return _StepPlan(is_whole=False)
        can_wait = min(row.num_tokens for row in group.rows) > 1 and budget >= len(group.rows)
        return _StepPlan(
            is_whole=False,
            is_held=not (can_wait and self.scheduler_config.enable_chunked_prefill),
        )

    @property
    def _budget(self) -> int:
        """Return how many more tokens this step has room for."""
        limit = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
        return limit - self._spent

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Return how many tokens a request may take; vLLM calls this for every request."""
        count = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        group = self._groups.get(request.request_id)
        if group is None:
            return count
        plan = self._plan(group)
        if plan.is_whole:
            return count
        left = request.num_tokens_with_spec + request.num_output_placeholders - num_computed_tokens
        if group.is_running:
            return 0 if plan.is_held else max(min(count, left - 1), 0)
        # A row needs at least one token to be admitted.
        later = sum(row.status != RequestStatus.RUNNING for row in group.rows) - 1
        return max(min(count, left - 1, self._budget - later), 1)

    def _allocate(self, request: Request, num_new_tokens: int, **options: Any) -> Any:
        """Return blocks for a request's tokens, or None; replaces vLLM's `allocate_slots`."""
        self._allocating = request
        group = self._groups.get(request.request_id)
        if group is not None:
            plan = self._plan(group)
            if request.status == RequestStatus.RUNNING and not group.is_running:
                return None  # another row was preempted in this step, and this one will be
            if not plan.has_room:
                plan.has_room = self._has_room(group, plan)
            if not plan.has_room:
                return None
            # The watermark was checked for all rows together; a later row must not fail it.
            options = {**options, "has_scheduled_reqs": False}
        blocks = self._allocate_slots(request, num_new_tokens, **options)
        if blocks is not None:
            self._spent += num_new_tokens
        return blocks

    def _has_room(self, group: Group, plan: _StepPlan) -> bool:
        """Tell whether there are blocks for the tokens of all rows, or to admit all of them."""
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if group.is_running:
            keep = 0 if plan.is_whole else 1
            budget = self._budget
            return free >= sum(
                self._blocks_for(
                    row,
                    row.num_computed_tokens + min(max(_tokens_left(row) - keep, 0), budget),
                )
                for row in group.rows
            )
        running = len(self.running) + self.num_waiting_for_streaming_input
        if plan.is_held or running + len(group.rows) > self.max_num_active_reqs:
            return False
        if self.running:
            free -= self.kv_cache_manager.watermark_blocks
        return free >= sum(
            self._blocks_for(row, row.num_tokens, self._local_hit(row)[0]) - self._shared(group, i)
            for i, row in enumerate(group.rows)
        )

    def _blocks_for(self, row: Request, tokens: int, cached: KVCacheBlocks | None = None) -> int:
        """Return how many free blocks a row needs to hold this many tokens."""
        manager = self.kv_cache_manager
        tokens = min(tokens, self.max_model_len)
        found = manager.empty_kv_cache_blocks if cached is None else cached
        computed = row.num_computed_tokens
        if cached is not None:
            computed += self._local_hit(row)[1]
        return int(
            manager.coordinator.get_num_blocks_to_allocate(
                request_id=row.request_id,
                num_tokens=tokens,
                new_computed_blocks=found.blocks,
                num_encoder_tokens=0,
                total_computed_tokens=computed,
                num_local_computed_tokens=computed,
                num_tokens_main_model=tokens,
                prefill_end=max(row.num_prompt_tokens, row.num_tokens - 1),
            )
        )

    def _local_hit(self, row: Request) -> tuple[Any, int]:
        blocks, count, _ = self.kv_cache_manager.get_computed_blocks(row)
        return blocks, count

    def _shared(self, group: Group, number: int) -> int:
        """Return how many uncached blocks a row shares with the rows before it."""
        if (
            not self.cache_config.enable_prefix_caching
            or len(self.kv_cache_config.kv_cache_groups) > 1
        ):
            return 0
        row = group.rows[number]
        shared = 0
        for other in group.rows[:number]:
            same = 0
            for own, its in zip(row.block_hashes, other.block_hashes, strict=False):
                if own != its:
                    break
                same += 1
            shared = max(shared, same)
        # The last token is always computed.
        shared = min(shared * self.hash_block_size, row.num_tokens - 1) // self.block_size
        return max(shared - self._local_hit(row)[1] // self.block_size, 0)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        """Leave a row that has to wait at its last token something to compute at admission."""
        blocks, count, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        group = self._groups.get(request.request_id)
        if group is None or count <= request.num_tokens - 2 or self._plan(group).is_whole:
            return blocks, count, boundary, diverged
        count = (request.num_tokens - 2) // self.block_size * self.block_size
        return (
            self.kv_cache_manager.truncate_computed_blocks(blocks, count),
            count,
            min(boundary, count),
            diverged,
        )

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Tell whether a waiting request may be considered in this step."""
        if request.request_id in self._failed:
            return False
        group = self._groups.get(request.request_id)
        if group is not None and any(
            row.num_stale_output_tokens and not row.drop_stale_output for row in group.rows
        ):
            return False
        return super()._handle_blocked_waiting_request(request)

    def _preempt_request(self, request: Request, *args: Any, **options: Any) -> None:
        """Put a request and the other rows of its group back into the queue."""
        super()._preempt_request(request, *args, **options)
        group = self._groups.get(request.request_id)
        # From last to first, because each is put at the front of the queue.
        for row in reversed(group.rows if group is not None else ()):
            if row.status != RequestStatus.RUNNING:
                continue
            # The row that needs the blocks is preempted once vLLM finds that it is the last one,
            # and the rows before it then.
            if row is self._allocating:
                break
            self.running.remove(row)
            super()._preempt_request(row, *args, **options)

    def _check(self, output: SchedulerOutput) -> None:
        """Fail a request whose rows are out of step: a wrong token must not leave the engine."""
        for group in self._plans:
            chooses = {
                row.request_id in output.num_scheduled_tokens and not row.is_prefill_chunk
                for row in group.rows
            }
            runs = {row.status == RequestStatus.RUNNING for row in group.rows}
            if len(chooses) > 1 or len(runs) > 1:
                logger.error("The rows of request %s are out of step.", group.first.request_id)
                self._failed.add(group.first.request_id)

    # ---- finished requests ----

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Process the step's tokens; only those of first rows leave the engine."""
        self.grammar_compile_error_reqs |= self._failed  # vLLM's way to fail a request
        self._failed.clear()
        others = self._other_rows()
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        for given in outputs.values():
            given.outputs = [one for one in given.outputs if one.request_id not in others]
            if given.finished_requests:
                given.finished_requests = given.finished_requests - others
        for first in self._end_groups():
            # A row ended alone, which vLLM should never cause.
            error = EngineCoreOutput(
                request_id=first.request_id,
                new_token_ids=[],
                finish_reason=first.get_finished_reason(),
            )
            if first.client_index in outputs:
                outputs[first.client_index].outputs.append(error)
        return outputs

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """End requests from outside, for example when a client disconnects."""
        others = self._other_rows() if request_ids is None else set()
        finished = super().finish_requests(request_ids, finished_status)
        self._end_groups(finished_status)
        return [request for request in finished if request.request_id not in others]

    def _other_rows(self) -> set[str]:
        return {name for name, group in self._groups.items() if name != group.first.request_id}

    def _free_request(self, request: Request, *args: Any, **options: Any) -> Any:
        group = self._groups.get(request.request_id)
        if group is not None and group not in self._ended:
            self._ended.append(group)
        return super()._free_request(request, *args, **options)

    def _end_groups(self, status: RequestStatus = RequestStatus.FINISHED_ERROR) -> list[Request]:
        """End the remaining rows of groups with an ended row; return first rows that remained."""
        orphaned = []
        while self._ended:
            group = self._ended.pop()
            for row in group.rows:
                self._groups.pop(row.request_id, None)
            left = [row for row in group.rows if not row.is_finished()]
            if group.first in left:
                orphaned.append(group.first)
            super().finish_requests([row.request_id for row in left], status)
        return orphaned


class AsyncPairScheduler(PairScheduler, AsyncScheduler):
    """The scheduler of engines that schedule a step before the last one's tokens arrive."""


def pair_scheduler(vllm_config: VllmConfig, **options: Any) -> PairScheduler:
    """Return the scheduler for a configuration.

    Used by `--scheduler-cls amulet.vllm_backend.scheduler.pair_scheduler`, because vLLM decides
    only after reading that option whether it schedules ahead.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    return (AsyncPairScheduler if is_async else PairScheduler)(vllm_config=vllm_config, **options)


def check_config(config: VllmConfig) -> None:
    """Refuse options that can't be combined with steered requests.

    Raises:
        ModelError: names the option.
    """
    refused = {
        "speculative decoding (--speculative-config)": config.speculative_config is not None,
        "KV transfer (--kv-transfer-config)": config.kv_transfer_config is not None,
        "the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
    }
    for name, is_there in refused.items():
        if is_there:
            raise ModelError(
                f"Steered requests can't be combined with {name}; leave it out, or serve plain "
                "requests with vllm serve."
            )


def one_step(config: SchedulerConfig) -> int:
    """Return how many tokens of one request a step is certain to read."""
    limits = (config.max_num_batched_tokens, config.max_num_scheduled_tokens)
    threshold = config.long_prefill_token_threshold
    return min(limit for limit in (*limits, threshold) if limit)


def _tokens_left(row: Request) -> int:
    """Return how many tokens of a row are neither computed nor being computed."""
    return row.num_tokens_with_spec + row.num_output_placeholders - row.num_computed_tokens


def _rows(request: Request, pair: Pair) -> list[Request]:
    """Create the rows of a steered request; the first is the request itself."""
    given = request.sampling_params
    row = Row(
        request=request.request_id,
        number=0,
        count=len(pair.prompts) + 1,
        pair=replace(pair, prompts=[]),
        temperature=given.temperature,
        top_k=max(given.top_k, 0),
        top_p=given.top_p,
        min_p=given.min_p,
        penalties=(given.repetition_penalty, given.presence_penalty, given.frequency_penalty),
        # All workers of a tensor-parallel group must draw the same token.
        seed=random.getrandbits(63) if given.seed is None else given.seed,
        is_seeded=given.seed is not None,
    )
    rows = [request]
    request.sampling_params = _row_params(given, row)
    for number, prompt in enumerate(pair.prompts, 1):
        params = _row_params(given, replace(row, number=number))
        params.logprobs = params.prompt_logprobs = params.logprob_token_ids = None
        rows.append(
            Request(
                request_id=f"{request.request_id}#{number}",
                client_index=request.client_index,
                prompt_token_ids=list(prompt),
                sampling_params=params,
                pooling_params=None,
                arrival_time=request.arrival_time,
                lora_request=request.lora_request,
                cache_salt=request.cache_salt,
                priority=request.priority,
                block_hasher=request._block_hasher,
            )
        )
    return rows


def _row_params(given: SamplingParams, row: Row) -> SamplingParams:
    """Return a row's parameters: greedy and without penalties, which the processor applies."""
    params = copy.copy(given)
    params.__dict__.clear()  # cached values derived from the old ones
    params.temperature, params.top_p, params.top_k, params.min_p = 0.0, 1.0, 0, 0.0
    params.repetition_penalty, params.presence_penalty, params.frequency_penalty = 1.0, 0.0, 0.0
    params.seed = None
    others = {key: value for key, value in (given.extra_args or {}).items() if key != PAIR}
    params.extra_args = {**others, **row.args()}
    return params
