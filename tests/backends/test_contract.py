"""One contract for all backends: rows are what was put into them, and the engine needs no more.

The reference passes all ids of a row at once, for every token.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Lfm2Config,
    MambaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
)

from amulet.backends.base import Backend
from amulet.backends.llamacpp.backend import LlamaBackend
from amulet.backends.llamacpp.model import GGUFModel
from amulet.backends.transformers import states
from amulet.backends.transformers.backend import TransformersBackend
from amulet.backends.transformers.cache import RowCache
from amulet.backends.transformers.general import GeneralBackend
from amulet.backends.transformers.restarting import RestartingBackend
from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation
from tests.backends.scripted import ScriptedBackend, scores
from tests.gguf_files import write_gguf
from tests.marks import needs_llamacpp
from tests.models import VOCAB_SIZE, byte_tokenizer, random_model

BEGINNING = [5, 9, 2, 6, 5, 3, 5, 8] * 5
PROMPTS = [[*BEGINNING, 1, 2, 3], [*BEGINNING, 4], [7, 7, 1], [*BEGINNING, 1, 2, 9, 9, 9]]


class Subject(NamedTuple):
    """A backend, what its logits are for a row of ids, `[vocab]`, and how exactly."""

    backend: Backend
    logits: Callable[[Sequence[int]], torch.Tensor]
    # Sums of some hundred products in float64, of numbers up to a hundred.
    exact: float = 1e-9

    def close(self, found: torch.Tensor, *rows: Sequence[int]) -> None:
        expected = torch.stack([self.logits(ids) for ids in rows])
        torch.testing.assert_close(found, expected, rtol=0, atol=self.exact)


def transformers() -> Subject:
    model = random_model("llama", dtype=torch.float64)

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids]), use_cache=False).logits[0, -1]

    return Subject(TransformersBackend(model), logits)


def general(
    config: PretrainedConfig, exact: float = 1e-9, backend: type[Backend] = GeneralBackend
) -> Subject:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids]), use_cache=False).logits[0, -1]

    return Subject(backend(model), logits, exact)


@cache
def tiny_gguf(name: str) -> tuple[GGUFModel, PreTrainedModel]:
    """A random Llama or LFM2 in a GGUF file, with float32 keys and values; and the same model."""
    folder = Path(tempfile.mkdtemp(prefix="amulet-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    config = lfm2_config(vocab_size=VOCAB_SIZE)
    made = random_model("llama") if name == "llama" else AutoModelForCausalLM.from_config(config)
    path = write_gguf(folder / f"{name}.gguf", made, byte_tokenizer())
    return GGUFModel(path, threads=1, kv_type="f32"), made.double().eval()


def llamacpp(name: str) -> Subject:
    model, made = tiny_gguf(name)

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return made(torch.tensor([ids]), use_cache=False).logits[0, -1].float()

    # Rounding of float32, 6e-8 of numbers up to a hundred, in sums that another number of rows
    # orders otherwise, through four layers.
    return Subject(LlamaBackend(model), logits, 1e-3)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


def bloom() -> Subject:
    return general(BloomConfig(**{**SIZES, "n_layer": 2, "n_head": 2}))


def lfm2_config(**sizes: int) -> Lfm2Config:
    kinds = ["conv", "full_attention"]
    return Lfm2Config(**{**SIZES, **sizes}, num_key_value_heads=1, layer_types=kinds)


def short_convolutions(backend: type[Backend]) -> Subject:
    return general(lfm2_config(), backend=backend)


def gated_delta_net(backend: type[Backend]) -> Subject:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    heads |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = ["linear_attention", "full_attention"]
    sizes = {**SIZES, "head_dim": 16, "num_key_value_heads": 1, "intermediate_size": 48}
    config = Qwen3_5TextConfig(**sizes, **heads, layer_types=kinds)
    # Its state is float32 whatever the model is.
    return general(config, exact=1e-4, backend=backend)


def mamba() -> Subject:
    config = MambaConfig(**SIZES, state_size=4, time_step_rank=4)
    # Its state is float32 whatever the model is.
    return general(config, exact=1e-4, backend=RestartingBackend)


def longrope(changes_at: int) -> Subject:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
    config = Phi3Config(
        **SIZES,
        intermediate_size=48,
        pad_token_id=None,
        max_position_embeddings=256,
        original_max_position_embeddings=changes_at,
        rope_parameters=rope,
    )
    return general(config, backend=RestartingBackend)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "transformers": transformers,
    "llama.cpp": partial(llamacpp, "llama"),
    "llama.cpp, convolutions": partial(llamacpp, "lfm2"),
    "general": bloom,
    "general, convolutions": partial(short_convolutions, GeneralBackend),
    "general, delta net": partial(gated_delta_net, GeneralBackend),
    "rows, convolutions": partial(short_convolutions, TransformersBackend),
    "rows, delta net": partial(gated_delta_net, TransformersBackend),
    "rows, Mamba": mamba,
    # In the middle of an answer, of a row by itself, and in that of the prompts.
    **{f"rows, longrope from {n} on": partial(longrope, n) for n in (44, 6, 41)},
    "scripted": lambda: Subject(ScriptedBackend(), scores),
    "scripted, recurrent": lambda: Subject(ScriptedBackend(any_length=False), scores),
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=needs_llamacpp if "llama.cpp" in name else ()) for name in SUBJECTS
    ]
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]()


def answer(subject: Subject, prompts: Sequence[list[int]], weight: float, tokens: int) -> list[int]:
    """Return the reference's greedy answer to a preferred prompt and a base prompt, or to one."""
    found: list[int] = []
    for _ in range(tokens):
        rows = [subject.logits([*prompt, *found]).log_softmax(-1) for prompt in prompts]
        mixed = rows[-1] + weight * (rows[0] - rows[-1]) if len(rows) == 2 else rows[0]
        found.append(int(mixed.argmax()))
    return found


def generation(prompts: Sequence[list[int]], weight: float, tokens: int) -> Generation:
    weights = [weight] if len(prompts) == 2 else []
    return Generation(prompts=prompts, weights=weights, max_new_tokens=tokens)


def run(engine: Engine) -> None:
    while engine.running:
        engine.step()


@torch.inference_mode()
def test_a_row_is_what_was_put_into_it(subject: Subject) -> None:
    backend = subject.backend
    one, other = [3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]
    backend.reserve(3, 16)
    after = backend.forward([one, other], [0, 0], 0, [5])
    subject.close(after[:, 0], one, other)
    backend.copy_row(1, 2, 6)
    saved = backend.save_row(0, 6)
    assert saved.nbytes == backend.row_bytes(6) > 0
    after = backend.step([[7], [8], [9]], [6, 6, 6])
    subject.close(after[:, 0], [*one, 7], [*other, 8], [*other, 9])
    backend.load_row(2, saved, 6)
    after = backend.forward([[1, 2]], [6], 2, [0, 1])
    subject.close(after[0], [*one, 1], [*one, 1, 2])


@torch.inference_mode()
def test_rows_are_of_any_length_where_the_backend_says_so(subject: Subject) -> None:
    backend = subject.backend
    if not backend.any_length:
        backend.reserve(2, 16)
        backend.forward([[3, 1, 4]], [0], 0, [2])
        with pytest.raises(AssertionError, match="no such length"):
            backend.copy_row(0, 1, 2)
        return
    backend.reserve(2, 16)
    backend.forward([[3, 1, 4, 1], [2, 6, 5, 0]], [0, 0], 0, [3])  # the last of them is padding
    after = backend.step([[5], [9]], [4, 3])
    subject.close(after[:, 0], [3, 1, 4, 1, 5], [2, 6, 5, 9])
    backend.copy_row(0, 1, 2)
    after = backend.step([[8], [8]], [3, 2])
    subject.close(after[:, 0], [3, 1, 4, 8], [3, 1, 8])


def test_rows_come_and_go_and_each_answer_is_that_of_a_full_recomputation(
    subject: Subject,
) -> None:
    engine = Engine(subject.backend, prefix_bytes=2**20, drafts=True)
    expected, asked = [], []
    for number, prompts in enumerate(
        [[PROMPTS[0], PROMPTS[1]], [PROMPTS[2]], [PROMPTS[3], PROMPTS[2]], [PROMPTS[1]]]
    ):
        tokens, weight = 3 + 2 * number, 1.0 + 0.5 * number
        expected.append(answer(subject, prompts, weight, tokens))
        asked.append(generation(prompts, weight, tokens))
        engine.admit(asked[-1])  # the others are in the middle of theirs
        engine.step()
    run(engine)
    assert [g.token_ids for g in asked] == expected
    assert {g.finish_reason for g in asked} == {"length"}
    assert subject.backend.nbytes == 0


def test_the_next_turn_computes_only_what_is_new(subject: Subject) -> None:
    engine = Engine(subject.backend, prefix_bytes=2**20)
    first = generation([PROMPTS[0]], 1.0, 6)
    engine.admit(first)
    run(engine)
    prompt = [*PROMPTS[0], *first.token_ids, 4, 2]
    second = generation([prompt], 1.0, 4)
    engine.admit(second)
    run(engine)
    assert second.token_ids == answer(subject, [prompt], 1.0, 4)
    assert second.cached_tokens == len(prompt) - 3  # the last token was never passed


def test_a_cancelled_answer_leaves_the_others_as_they_are(subject: Subject) -> None:
    engine = Engine(subject.backend)
    asked = [generation([prompt], 1.0, 6) for prompt in PROMPTS]
    for each in asked:
        engine.admit(each)
    engine.retire(asked[0])
    run(engine)
    assert [g.finish_reason for g in asked] == ["cancelled", "length", "length", "length"]
    for prompt, each in zip(PROMPTS[1:], asked[1:], strict=True):
        assert each.token_ids == answer(subject, [prompt], 1.0, 6)


def test_a_prompt_in_parts_joins_where_a_row_has_left(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject.backend, "chunk", 16, raising=False)
    engine = Engine(subject.backend)
    goes, stays, joins = (
        generation([prompt], 1.0, tokens)
        for prompt, tokens in zip([PROMPTS[2], PROMPTS[1], PROMPTS[0]], [2, 9, 3], strict=True)
    )
    for each in (stays, goes):
        engine.admit(each)
    engine.step()  # after which one of them has left
    engine.admit(joins)
    run(engine)
    for each in (goes, stays, joins):
        assert each.token_ids == answer(subject, each.prompts, 1.0, each.max_new_tokens)


def test_nothing_that_other_weights_computed_is_used() -> None:
    backend = ScriptedBackend()
    engine = Engine(backend, prefix_bytes=2**20)
    engine.admit(generation([PROMPTS[0]], 1.0, 3))
    run(engine)
    backend.changed()
    again = generation([PROMPTS[0]], 1.0, 3)
    engine.admit(again)
    assert again.cached_tokens == 0


def test_a_recurrent_row_is_saved_where_prompts_part() -> None:
    backend = ScriptedBackend(any_length=False)
    engine = Engine(backend, prefix_bytes=2**20)
    backend.worth_sharing, cached = 8, []
    for end in ([1, 2, 3], [4, 4], [5, 6, 7]):
        asked = generation([[*BEGINNING, *end]], 1.0, 2)
        engine.admit(asked)
        run(engine)
        cached.append(asked.cached_tokens)
        assert asked.token_ids == answer(Subject(backend, scores), asked.prompts, 1.0, 2)
    assert cached == [0, 0, len(BEGINNING)]  # the second prompt shows where they part


def test_weights_that_change_during_a_prefill_leave_no_row() -> None:
    backend = ScriptedBackend(any_length=False)
    engine = Engine(backend, prefix_bytes=2**20)
    seen: list[int] = []

    def change(token: int) -> bool:
        seen.append(token)
        if len(seen) == 3:
            backend.changed()
        return len(seen) == 3

    engine.admit(Generation(prompts=[[1] * 20], max_new_tokens=50, on_token=change))
    common = [7 * i % 50 for i in range(120)]
    two = [[*common, 1, 2], [*common, 3, 4]]
    engine.admit(Generation(prompts=two, weights=[1.0], max_new_tokens=2))
    assert len(seen) == 3
    run(engine)
    last = Generation(prompts=[[*common, 9, 9]], max_new_tokens=2)
    engine.admit(last)
    assert last.cached_tokens == 0


def test_a_growth_that_fails_leaves_the_memory_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RowCache()
    cache.reserve(2, 10)
    cache.begin(0, [0, 0], 10)
    keys = torch.ones(2, 2, 10, 16)
    cache.update(keys, keys, 0)
    cache.update_recurrent_state(torch.ones(2, 4), 1)
    cache.update_recurrent_state(torch.ones(2, 4), 2)
    held = cache._keys[0].untyped_storage().nbytes(), cache.nbytes, cache.row_bytes(10)
    resized, calls = states._resized, []

    def fails(state: torch.Tensor, rows: int) -> torch.Tensor:
        calls.append(rows)
        if len(calls) == 2:
            raise MemoryError
        return resized(state, rows)

    monkeypatch.setattr(states, "_resized", fails)
    with pytest.raises(MemoryError):
        cache.reserve(8, 300)
    assert held == (cache._keys[0].untyped_storage().nbytes(), cache.nbytes, cache.row_bytes(10))
    cache.begin(0, [10, 10], 1)
    found = cache.get_recurrent_state(1)
    assert found is not None
    assert torch.equal(found, torch.ones(2, 4))


def test_bytes_are_told_while_a_first_pass_makes_states() -> None:
    """Metrics are read in another thread than the decode thread."""
    held = states.RowStates()
    held.reserve(1)

    class Interrupted:
        @property
        def nbytes(self) -> int:
            held.update(states.Place("conv", 1, 0), torch.ones(1, 4))
            return 16

    held._states[states.Place("conv", 0, 0)] = Interrupted()  # type: ignore[assignment]
    held.begin(0, [0], 1)
    assert held.nbytes == 16


def test_a_shared_beginning_is_computed_once() -> None:
    backend = ScriptedBackend()
    Engine(backend).admit(generation([PROMPTS[0], PROMPTS[1]], 1.0, 1))
    assert sum(rows * width for rows, width in backend.passes) < len(PROMPTS[0]) + len(BEGINNING)


@pytest.mark.parametrize("any_length", [True, False])
def test_a_recurrent_row_gets_no_padding_and_no_drafts(any_length: bool) -> None:
    repeats = ScriptedBackend(any_length, lambda ids: torch.eye(64)[(ids[-1] + 1) % 8])
    engine = Engine(repeats, drafts=True)
    asked = generation([list(range(8)) * 4, list(range(8)) * 3], 1.0, 24)
    engine.admit(asked)
    run(engine)
    assert asked.token_ids == [number % 8 for number in range(24)]
    widths = {width for _, width in repeats.passes[2:]}
    assert (max(widths) > 1) is any_length
