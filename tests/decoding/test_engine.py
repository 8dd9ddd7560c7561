"""Admit, step, retire: rows come and go, one generation's failure is its own, limits hold."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from amulet.backends.transformers.cache import COLUMN_STEP, RowCache
from amulet.backends.transformers.model_backend import WORTH_SHARING
from amulet.decoding.engine import Engine, common_prefix, share_passes
from amulet.decoding.generation import Generation
from amulet.decoding.sampling import Sampling
from amulet.errors import ModelError, OutOfMemoryError
from tests.backends.scripted import ScriptedBackend, scores
from tests.engines import engine_over
from tests.models import ScriptedModel, random_model


def drain(engine: Engine) -> None:
    while engine.running:
        engine.step()


def said(tokenizer: PreTrainedTokenizerFast, generation: Generation) -> str:
    return tokenizer.decode(generation.token_ids)


@pytest.fixture
def prompt(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.encode("Tell me.\n")


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> Engine:
    return engine_over(ScriptedModel(tokenizer, "one two three"))


def test_the_end_id_ends_and_is_kept(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    heard: list[int] = []

    def hear(token_id: int) -> bool:
        heard.append(token_id)
        return False

    end = frozenset({tokenizer.eos_token_id})
    generation = Generation(prompts=[prompt], end_ids=end, on_token=hear)
    engine.admit(generation)
    drain(engine)
    assert said(tokenizer, generation) == "one two three<|im_end|>"
    assert tokenizer.decode(heard) == "one two three"
    assert generation.finish_reason == "stop"


def test_the_limit_ends_even_at_the_first_token(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    generation = Generation(prompts=[prompt], max_new_tokens=1)
    engine.admit(generation)
    assert generation.finish_reason == "length"
    assert said(tokenizer, generation) == "o"
    assert engine.running == []


def test_on_token_ends_the_answer_in_the_same_step(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    generation = Generation(prompts=[prompt], on_token=lambda token_id: token_id == ord("w"))
    engine.admit(generation)
    drain(engine)
    assert said(tokenizer, generation).endswith("tw")
    assert generation.finish_reason == "stop"


def test_a_failing_callback_is_its_own_generations_affair(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    def fail(token_id: int) -> bool:
        raise KeyError("mine")

    class Bad(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise ValueError("processor")

    def no_grammar() -> torch.Tensor:
        raise ValueError("grammar")

    good = Generation(prompts=[prompt], end_ids=frozenset({tokenizer.eos_token_id}))
    bad = [
        Generation(prompts=[prompt], on_token=fail),
        Generation(prompts=[prompt], processors=[Bad()]),
        Generation(prompts=[prompt], allowed=no_grammar),
    ]
    engine.admit(good)
    for generation in bad:
        engine.admit(generation)
    drain(engine)
    assert said(tokenizer, good) == "one two three<|im_end|>"
    assert [str(generation.error) for generation in bad] == ["'mine'", "processor", "grammar"]


def test_processors_see_prompt_and_answer_and_act_after_steering(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    seen: list[list[int]] = []

    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids[0].tolist())
            scores[:, ord("z")] = 1e9
            return scores

    generation = Generation(
        prompts=[prompt, prompt[:3]], weights=[3.0], processors=[Only()], max_new_tokens=3
    )
    engine.admit(generation)
    drain(engine)
    assert said(tokenizer, generation) == "zzz"
    assert seen == [prompt, [*prompt, ord("z")], [*prompt, ord("z"), ord("z")]]


def test_weights_of_zero_decode_the_base_row(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = engine_over(ScriptedModel(tokenizer, {"wish": "steered!", "": "plain.."}))
    generation = Generation(
        prompts=[tokenizer.encode("wish\n"), tokenizer.encode("none\n")], weights=[1.0]
    )
    generation.max_new_tokens = 8
    engine.admit(generation)
    drain(engine)
    assert said(tokenizer, generation) == "steered!"
    off = Generation(prompts=generation.prompts, weights=[0.0], max_new_tokens=7)
    engine.admit(off)
    drain(engine)
    assert said(tokenizer, off) == "plain.."


def test_a_grammar_and_a_floor_always_leave_a_token(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    mask = torch.zeros(200, dtype=torch.bool)  # shorter than the logits: the rest is forbidden
    mask[ord("x")] = True
    generation = Generation(
        prompts=[prompt, prompt], weights=[3.0], floor=1.0, allowed=lambda: mask, max_new_tokens=2
    )
    engine.admit(generation)
    drain(engine)
    assert said(tokenizer, generation) == "xx"


def test_the_shared_prefix_is_computed_once(
    tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    model = ScriptedModel(tokenizer, "ok")
    engine = engine_over(model)
    long = prompt * (1 + WORTH_SHARING // len(prompt))
    rows = [[*long, 65, 10], [*long, 66, 67, 10], [*long, 10]]
    engine.admit(Generation(prompts=rows, weights=[1.0, 1.0], max_new_tokens=1))
    assert model.calls == [(1, len(long)), (3, 3)]
    engine.admit(Generation(prompts=[[*prompt, 65], [*prompt, 66]], max_new_tokens=1))
    assert model.calls[2:] == [(2, len(prompt) + 1)], "so short a beginning is no pass of its own"


def test_long_rows_that_share_little_start_anew_each_by_itself(
    tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    """A pass that starts at column 0 needs no mask, and a long one fills the processor alone."""
    model = ScriptedModel(tokenizer, "ok")
    rows = [[*prompt, 65, *prompt * 40], [*prompt, *prompt * 40]]
    engine_over(model).admit(Generation(prompts=rows, weights=[1.0], max_new_tokens=1))
    assert model.calls == [(1, len(rows[0])), (1, len(rows[1]))]


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 2, "each row keeps an id of its own"
    assert common_prefix([1], [1, 2]) == 0
    assert common_prefix([1, 2], [2, 1]) == 0


def test_the_trace_names_the_plain_choice(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = engine_over(ScriptedModel(tokenizer, {"wish": "A", "": "B"}))
    generation = Generation(
        prompts=[tokenizer.encode("wish\n"), tokenizer.encode("none\n")],
        weights=[2.0],
        trace=True,
        top_logprobs=2,
        max_new_tokens=1,
    )
    engine.admit(generation)
    (scores,) = generation.scores
    # logits: 20 for the scripted token, 0 for all others, in a vocabulary of 320
    certain = 20 - torch.tensor(20.0).exp().add(319).log()
    assert generation.token_ids == [ord("A")]
    assert scores.unsteered_id == ord("B")
    assert scores.preferred == pytest.approx(certain.item(), abs=1e-5)
    assert scores.base == pytest.approx(certain.item() - 20, abs=1e-5)
    # p + (p − r): 40 − ... for A, −20 − ... for B
    assert scores.steered == pytest.approx(0.0, abs=1e-6)
    assert scores.top[0][0] == ord("A")


def test_out_of_memory_names_the_batch_and_spares_the_others(
    tokenizer: PreTrainedTokenizerFast, prompt: list[int]
) -> None:
    model = ScriptedModel(tokenizer, "abc")
    engine = engine_over(model)
    going = Generation(prompts=[prompt], max_new_tokens=3)
    engine.admit(going)
    model.fail_with = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemoryError, match=r"2 rows of up to 9 tokens"):
        engine.admit(Generation(prompts=[prompt]))
    drain(engine)
    assert said(tokenizer, going) == "abc"


def test_ended_generations_leave_no_memory(
    engine: Engine, prompt: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    generation = Generation(prompts=[prompt], sampling=Sampling(temperature=1.0), seed=1)
    engine.admit(generation)
    assert engine.backend.nbytes > 0
    engine.retire(generation)
    assert (engine.backend.nbytes, engine.running, generation.finish_reason) == (0, [], "cancelled")
    reference = weakref.ref(generation)
    del generation
    gc.collect()
    assert reference() is None


def test_the_next_answer_s_cache_is_made_before_its_first_pass() -> None:
    """Made within the pass, its buffers would lie between holes that the pass's tensors leave."""
    cache = RowCache()
    cache.reserve(1, 5)
    cache.begin(0, [0], 5)
    for layer, shape in enumerate([(1, 2, 5, 16), (1, 4, 5, 32)]):
        cache.update(torch.ones(shape), torch.ones(shape), layer)
    cache.free()
    cache.free()
    assert cache.nbytes == 0
    cache.reserve(2, 300)
    keys, values = cache.buffers(0, 2)
    shapes = [(2, 2, 2 * COLUMN_STEP, 16), (2, 4, 2 * COLUMN_STEP, 32)]
    assert [tuple(made.shape) for made in keys] == [tuple(made.shape) for made in values] == shapes
    assert not any(made.any() for made in (*keys, *values))
    cache.clear()
    cache.reserve(2, 300)
    assert cache.buffers(0, 2) == ([], [])


def test_a_model_that_was_cast_since_answers_as_a_new_one() -> None:
    model = random_model("llama")
    prompt = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0)).tolist()

    def answer(engine: Engine) -> list[int]:
        generation = Generation(prompts=[prompt], max_new_tokens=6)
        engine.admit(generation)
        drain(engine)
        return generation.token_ids

    engine = engine_over(model, prefix_bytes=2**20)
    answer(engine)
    assert engine.prefixes.nbytes > 0
    model.bfloat16()
    assert answer(engine) == answer(engine_over(model))


def test_unsupported_models_are_refused_with_the_way_out() -> None:
    model = random_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        engine_over(model)
    model = random_model("qwen2")
    model.config.layer_types = ["compressed_sparse_attention"] * 4
    with pytest.raises(ModelError, match="compressed_sparse_attention"):
        engine_over(model)
    model.config.layer_types = ["linear_attention"] * 4
    with pytest.raises(ModelError, match="does not carry its recurrent state"):
        engine_over(model)


Rows = list[tuple[int, int]]  # the ids that each lacks, and that it may get


def cost_of(passes: list[Rows], each: int) -> int:
    return sum(len(rows) * max(rows)[0] + each for rows in passes)


def partitions(rows: Rows) -> Iterator[list[Rows]]:
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        parts = [[rows[0]]]
        for cut, row in zip(cuts, rows[1:], strict=True):
            if cut:
                parts.append([row])
            else:
                parts[-1].append(row)
        yield parts


@given(
    given=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=7),
    cost=st.integers(0, 50),
    any_length=st.booleans(),
)
def test_passes_cost_as_little_as_any_way_of_grouping_rows(
    given: list[tuple[int, int]], cost: int, any_length: bool
) -> None:
    backend = ScriptedBackend(any_length)
    backend.chunk, backend.pass_cost = 60, cost
    rows = [(ids, ids + more) for ids, more in given]
    found = share_passes([ids for ids, _ in rows], [room for _, room in rows], backend)
    assert [i for part in found for i in part] == list(range(len(rows)))

    def is_possible(part: Rows) -> bool:
        widest = max(part)[0]
        fits = len(part) * widest <= 60 and widest <= min(room for _, room in part)
        return len(part) == 1 or (fits and (any_length or len({ids for ids, _ in part}) == 1))

    parts = [[rows[i] for i in part] for part in found]
    assert all(map(is_possible, parts))
    possible = [cost_of(p, cost) for p in partitions(rows) if all(map(is_possible, p))]
    assert cost_of(parts, cost) == min(possible)


def asked(*prompts: list[int], **options: Any) -> Generation:
    return Generation(prompts=list(prompts), weights=[0.5] * (len(prompts) - 1), **options)


def test_short_prompts_that_wait_together_share_passes() -> None:
    prompts = [[[i, 1], [i]] for i in range(1, 5)]
    alone, together = ScriptedBackend(), ScriptedBackend()
    expected, found = [[asked(*rows, max_new_tokens=4) for rows in prompts] for _ in range(2)]
    for backend, generations in ((alone, expected), (together, found)):
        engine = Engine(backend)
        while generations_left := [g for g in generations if not g.token_ids]:
            count = engine.together(generations_left) if backend is together else 1
            engine.admit(*generations_left[:count])
        drain(engine)
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    assert (together.passes[0], alone.passes[0]) == ((8, 2), (2, 2))


@pytest.mark.parametrize(
    ("lengths", "count"),
    [([8, 8, 8, 8, 8], 4), ([40, 2, 2], 1), ([2, 40, 2], 1), ([2, 2, 40], 2)],
    ids=["as many as a pass is worth", "long first", "long second", "long last"],
)
def test_long_prompts_delay_no_others(lengths: list[int], count: int) -> None:
    engine = Engine(ScriptedBackend())  # a pass costs 4 ids, so 32 ids are worth one
    waiting = [asked([i] * length) for i, length in enumerate(lengths)]
    assert engine.together(waiting) == count


def test_a_prompt_waits_for_the_one_that_it_can_copy_from() -> None:
    engine = Engine(ScriptedBackend(), prefix_bytes=2**20)
    beginning = list(range(20))
    waiting = [asked([*beginning, i], max_new_tokens=9) for i in range(30, 34)]
    assert engine.together(waiting) == 1
    engine.admit(waiting[0])
    assert engine.together(waiting[1:]) == 3  # all the rest of them is one id each
    engine.admit(*waiting[1:])
    assert engine.backend.passes[-1] == (3, 1)  # type: ignore[attr-defined]
    assert [g.cached_tokens for g in waiting] == [0, 20, 20, 20]


def test_rows_that_cant_be_padded_and_prompts_with_images_are_prefilled_alone() -> None:
    assert Engine(ScriptedBackend(any_length=False)).together([asked([1]), asked([2])]) == 1
    image: Any = object()
    engine = Engine(ScriptedBackend())
    assert engine.together([asked([1], images=[image]), asked([2])]) == 1
    assert engine.together([asked([1]), asked([2]), asked([3], images=[image])]) == 2


def test_one_of_several_may_be_cancelled_while_all_are_prefilled() -> None:
    backend = ScriptedBackend()
    engine = Engine(backend)
    running = asked([7] * 10, max_new_tokens=50)
    engine.admit(running)
    waiting = [asked([i] * 6, [i] * 5, max_new_tokens=5) for i in range(1, 4)]
    running.on_token = lambda _: engine.retire(waiting[1]) or True  # type: ignore[func-returns-value]
    engine.admit(*waiting)  # a step is due, in which the second is cancelled and the first row ends
    drain(engine)
    assert (waiting[1].token_ids, waiting[1].finish_reason) == ([], "cancelled")
    for generation in (waiting[0], waiting[2]):
        expected = asked(*generation.prompts, max_new_tokens=5)
        Engine(other := ScriptedBackend()).admit(expected)
        assert generation.token_ids[0] == expected.token_ids[0], other
        assert generation.finish_reason == "length"


def test_prompts_that_begin_alike_share_passes_where_nothing_is_copied() -> None:
    beginning = list(range(6))
    waiting = [asked([*beginning, i]) for i in range(10, 14)]
    assert Engine(ScriptedBackend(), prefix_bytes=2**20).together(waiting) == 1
    assert Engine(ScriptedBackend(), prefix_bytes=0).together(waiting) == 4


def test_a_long_copied_prompt_takes_no_room_in_the_passes_of_others() -> None:
    backend = ScriptedBackend()
    engine = Engine(backend, prefix_bytes=2**20)
    beginning = list(range(40))
    engine.admit(asked(beginning, max_new_tokens=9))
    waiting = [asked([*beginning, 50]), asked([60] * 20)]
    assert engine.together(waiting) == 2
    engine.admit(*waiting)
    assert backend.passes[-2:] == [(1, 1), (1, 20)]
    assert backend.room == (3, 42)  # the longest prompt and a token


@pytest.mark.parametrize(
    ("tokens", "passes"), [(5, [(1, 1), (1, 20)]), (30, [(2, 20)])], ids=["near its end", "far"]
)
def test_no_row_is_padded_beyond_the_models_window(
    tokens: int, passes: list[tuple[int, int]]
) -> None:
    """Learned positions end with the window: GPT-2's have no place for more."""
    backend = ScriptedBackend()
    backend.chunk, backend.pass_cost = 1000, 50
    engine = Engine(backend, prefix_bytes=2**20)
    beginning = list(range(40))
    engine.admit(asked(beginning, max_new_tokens=9))
    waiting = [
        asked(prompt, max_new_tokens=tokens) for prompt in ([*beginning, 50], [60] * 20)
    ]  # with as many tokens as the window leaves
    assert engine.together(waiting) == 2
    engine.admit(*waiting)
    assert backend.passes[-len(passes) :] == passes


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_all_cancelled_in_their_last_pass_leave_nothing_behind(count: int) -> None:
    def cancel(ids: Sequence[int]) -> torch.Tensor:
        for generation in waiting:
            generation.finish_reason = "cancelled"
        return scores(ids)

    engine = Engine(backend := ScriptedBackend(logits=cancel))
    waiting = [asked([i] * 5) for i in range(count)]
    engine.admit(*waiting)
    assert [generation.token_ids for generation in waiting] == [[]] * count
    assert (engine.running, backend.rows, backend.room) == ([], {}, (0, 0))
