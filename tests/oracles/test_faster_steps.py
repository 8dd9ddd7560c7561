"""Steps made faster decode the same tokens: with drafts, compiled, with grouped attention."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from amulet.backends.transformers.attention import (
    causal_behind_cached,
    grouped,
    grouped_attention,
)
from amulet.backends.transformers.cpu import native
from amulet.backends.transformers.cpu.layers import are_native
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation
from amulet.decoding.prompt_lookup import Draft
from amulet.decoding.sampling import Sampling
from tests.engines import engine_over
from tests.models import KINDS, Kind, random_model
from tests.oracles.reference import generate
from tests.oracles.test_decode import TOKENS, decodes_as_transformers, ids, plain, run, steered

COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")


class _Foretold(Draft):
    """Proposes what is known to come, with mistakes at random places."""

    def __init__(self, tokens: Sequence[int], seed: int) -> None:
        super().__init__([])
        self.tokens, self.rng, self.right = tokens, random.Random(seed), 0

    def propose(self, answer: Sequence[int], limit: int) -> list[int]:
        draft = list(self.tokens[len(answer) : len(answer) + min(limit, self.rng.randrange(9))])
        if draft and self.rng.random() < 0.5:
            place = self.rng.randrange(len(draft))
            draft[place] = (draft[place] + 1) % 256
        return draft

    def learn(self, proposed: int, accepted: int, answer_length: int) -> None:
        self.right += accepted


def _passes(engine: Engine) -> list[int]:
    """Return a list that will hold the width of every pass."""
    widths: list[int] = []
    forward = engine.backend.forward

    def counted(new: Sequence[Sequence[int]], *rest: object) -> torch.Tensor:
        widths.append(len(new[0]))
        return forward(new, *rest)  # type: ignore[arg-type]

    engine.backend.forward = counted  # type: ignore[method-assign]
    return widths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_no_token(kind: Kind, temperature: float) -> None:
    model = random_model(kind, dtype=torch.float64)
    rng = random.Random(kind)
    prompt, base, other = ids(rng, 30), ids(rng, 12), ids(rng, 21)
    options = {"sampling": Sampling(temperature=temperature), "seed": 5, "floor": 0.01}

    def fresh() -> list[Generation]:
        return [steered(prompt, base, 2.0, **options), plain(other, **options)]

    expected = fresh()
    run(engine_over(model), expected)
    drafted = fresh()
    for i, generation in enumerate(drafted):
        generation.draft = _Foretold(expected[i].token_ids, i)
    engine = engine_over(model, drafts=True)
    widths = _passes(engine)
    run(engine, drafted)
    assert [g.token_ids for g in drafted] == [g.token_ids for g in expected]
    assert sum(g.draft.right for g in drafted) > 20  # type: ignore[union-attr]
    assert max(widths[2:]) > 3, "no step checked a draft"


def test_drafts_keep_what_is_collected_per_token_and_end_where_they_should() -> None:
    model = random_model("llama", dtype=torch.float64)
    rng = random.Random(2)
    prompt, base = ids(rng, 30), ids(rng, 12)
    reference = steered(prompt, base, 2.0)
    reference.end_ids = frozenset()
    run(engine_over(model), [reference])
    tokens = reference.token_ids

    def collected(drafts: bool) -> Generation:
        seen: list[int] = []

        def on_token(token_id: int) -> bool:
            seen.append(token_id)
            return len(seen) == 23

        generation = steered(prompt, base, 2.0, trace=True, top_logprobs=2, on_token=on_token)
        generation.end_ids = frozenset()
        if drafts:
            generation.draft = _Foretold(tokens, 1)
        run(engine_over(model, drafts=drafts), [generation])
        assert seen == generation.token_ids == tokens[:23]
        assert generation.finish_reason == "stop"
        return generation

    for drafted, single in zip(collected(True).scores, collected(False).scores, strict=True):
        assert drafted.unsteered_id == single.unsteered_id
        assert drafted.steered == pytest.approx(single.steered, abs=1e-9)
        assert [i for i, _ in drafted.top] == [i for i, _ in single.top]


def test_an_answer_that_copies_its_prompt_takes_fewer_steps() -> None:
    model = random_model("gemma3", dtype=torch.float64)
    rng = random.Random(3)
    start = ids(rng, 40)
    first = plain(start)
    run(engine_over(model), [first])
    prompt = start + first.token_ids[:40]
    engine = engine_over(model, drafts=True)
    widths = _passes(engine)
    generation = plain(prompt)
    run(engine, [generation])
    assert generation.token_ids == generate(model, prompt, TOKENS)
    assert len(widths) < len(generation.token_ids), widths


def test_draft_checks_do_not_go_beyond_a_limit() -> None:
    model = random_model("llama", dtype=torch.float64)
    prompt = ids(random.Random(4), 30)
    expected = plain(prompt)
    expected.end_ids, expected.max_new_tokens = frozenset(), 30
    run(engine_over(model), [expected])
    generation = plain(prompt)
    generation.end_ids, generation.max_new_tokens = frozenset(), 10
    generation.draft = _Foretold(expected.token_ids, 0)
    engine = engine_over(model, drafts=True)
    widths = _passes(engine)
    run(engine, [generation])
    assert generation.token_ids == expected.token_ids[:10]
    assert generation.finish_reason == "length"
    decoded = 1
    for width in widths[1:]:
        assert decoded + width <= 10
        decoded += 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float64), ("gemma3", torch.float32)],  # the second takes the C code
)
def test_a_compiled_step_decodes_what_transformers_does(
    kind: Kind,
    dtype: torch.dtype,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One graph for one row and many, level or not, short and long."""
    monkeypatch.setattr(native, "_libraries", [])  # nobody has looked for the C code before
    model = random_model(kind, dtype=dtype, layers=2)  # one of each kind; each is compiled
    rng = random.Random(kind)
    engine = engine_over(model, compile=True)
    widths = _passes(engine)
    caplog.set_level(logging.INFO, "amulet")
    for lengths in ((40,), (20, 33, 64)):
        decodes_as_transformers(engine, model, rng, lengths)
    lines = [record.getMessage() for record in caplog.records if record.name == "amulet"]
    assert len(lines) == 1
    assert lines[0].startswith("Compiled the decode step")
    assert 1 not in widths, "a step ran uncompiled"


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_uses_packed_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("qwen2", head_dim=32, layers=2)
    pack_linears(model)
    prompt = ids(random.Random(6), 30)
    eager, compiled = plain(prompt), plain(prompt)
    run(engine_over(model), [eager])
    engine = engine_over(model, compile=True)
    widths = _passes(engine)
    run(engine, [compiled])
    assert compiled.token_ids == eager.token_ids
    assert 1 not in widths
    # With the C code whole layers are that, too, unless they are compiled.
    assert are_native(model) == any("layers are C code" in line for line in caplog.messages)
    assert are_native(model) == (native.library() is not None)


def test_what_can_not_be_compiled_runs_uncompiled_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("No C++ compiler found.\n\n" + "Long explanation. " * 50)

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = random_model("llama", dtype=torch.float64)
    prompt = ids(random.Random(7), 30)
    generation = plain(prompt)
    run(engine_over(model, compile=True), [generation])
    assert generation.token_ids == generate(model, prompt, TOKENS)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "The decode step can't be compiled and runs uncompiled: RuntimeError: No C++ compiler "
        "found. Long explanation."
    )
    assert len(line) < 400


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("width", [1, 7, 40])
def test_grouped_attention_gives_what_sdpa_gives(kind: Kind, width: int) -> None:
    model = random_model(kind, dtype=torch.float64)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tokens = torch.tensor([ids(random.Random(8), width), ids(random.Random(9), width)])
    mask = torch.ones(2, 1, width, width, dtype=torch.bool).tril()
    mask[1, :, :, 0] = False
    mask[1, :, 0, 0] = True
    with torch.inference_mode():
        expected = model(tokens, attention_mask=mask).logits
        with grouped():
            found = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("start", [1, 25])
@pytest.mark.parametrize("width", [2, 40])
def test_a_pass_behind_cached_tokens_needs_no_mask(kind: Kind, start: int, width: int) -> None:
    model = random_model(kind, dtype=torch.float64)
    engine = engine_over(model)
    tokens = [ids(random.Random(seed), start + width) for seed in (10, 11)]
    made: list[torch.Tensor | None] = []
    masks = engine.backend._cache.masks

    def noted(*given: Any, **options: Any) -> Any:
        found = masks(*given, **options)
        made.append(found["full_attention"] if isinstance(found, dict) else found)
        return found

    engine.backend._cache.masks = noted  # type: ignore[method-assign]
    with torch.inference_mode():
        expected = model(torch.tensor(tokens)).logits[:, start:]
        engine.backend._cache.reserve(2, start + width)
        engine.backend.forward([row[:start] for row in tokens], [0, 0], 0, [start - 1])
        found = engine.backend.forward(
            [row[start:] for row in tokens], [start] * 2, 0, list(range(width))
        )
    torch.testing.assert_close(found, expected)
    assert made == [None, None]


def test_code_that_brings_its_own_attention_gets_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    assert causal_behind_cached(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_supports_attention_backend", False)
        assert not causal_behind_cached(model)
    model.set_attn_implementation("eager")
    assert not causal_behind_cached(model)


@pytest.mark.parametrize("width", [4, 40])
def test_values_of_another_size_than_keys_are_causal_behind_cached_tokens(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, width, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 3, width + 5, 8, generator=generator, dtype=torch.float64)
    value = torch.randn(2, 3, width + 5, 4, generator=generator, dtype=torch.float64)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found, _ = grouped_attention(module, query, key, value, None)
    products = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    hidden = torch.ones(width, width + 5, dtype=torch.bool).triu(6)
    weights = products.masked_fill(hidden, float("-inf")).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
