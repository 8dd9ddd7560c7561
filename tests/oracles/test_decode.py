"""The engine against Transformers, token for token, alone and in mixed batches.

Random-weight models are compared in float64: their logits lie so close together that float32
rounding, not the algorithm, would decide. SmolLM2 is compared in float32.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation
from amulet.decoding.sampling import Sampling
from amulet.preference import Preference
from amulet.prompting.prompts import encode_chat
from tests.engines import engine_over
from tests.models import IM_END, KINDS, Kind, random_model
from tests.oracles.reference import generate

STRENGTHS = (0.5, 2.0, 4.6487)
TOKENS = 64
SMOLLM_TOKENS = 12


def run(engine: Engine, generations: list[Generation]) -> None:
    """Admit all, then step until the batch is empty."""
    for generation in generations:
        engine.admit(generation)
    while engine.running:
        engine.step()
    for generation in generations:
        assert generation.error is None


def steered(prompt: list[int], base: list[int], strength: float, **options: object) -> Generation:
    return Generation(
        prompts=[prompt, base],
        weights=[1.0 + strength],
        max_new_tokens=TOKENS,
        end_ids=frozenset({IM_END}),
        **options,  # type: ignore[arg-type]
    )


def plain(prompt: list[int], **options: object) -> Generation:
    return Generation(
        prompts=[prompt],
        max_new_tokens=TOKENS,
        end_ids=frozenset({IM_END}),
        **options,  # type: ignore[arg-type]
    )


def decodes_as_transformers(
    engine: Engine, model: PreTrainedModel, rng: random.Random, lengths: Sequence[int]
) -> None:
    """Decode plain prompts of these lengths and a steered pair together, and compare each."""
    prompts = [ids(rng, length) for length in lengths]
    pair = [ids(rng, 50), ids(rng, 17)]
    generations = [plain(prompt) for prompt in prompts] + [steered(pair[0], pair[1], 2.0)]
    run(engine, generations)
    for prompt, generation in zip(prompts, generations, strict=False):
        assert generation.token_ids == generate(model, prompt, TOKENS)
    guided = generate(model, pair[0], TOKENS, base=pair[1], strength=2.0)
    assert generations[-1].token_ids == guided


def ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(256) for _ in range(length)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_steered_equals_guidance_on_random_models(kind: Kind, strength: float) -> None:
    model = random_model(kind, dtype=torch.float64)
    rng = random.Random(f"{kind}{strength}")
    shared = ids(rng, 20)
    prompt, base = shared + ids(rng, 23), shared + ids(rng, 9)
    generation = steered(prompt, base, strength)
    run(engine_over(model), [generation])
    expected = generate(model, prompt, TOKENS, base=base, strength=strength)
    assert generation.token_ids == expected
    assert len(set(expected)) > 4, "the random model repeats itself: the comparison is empty"


@pytest.mark.parametrize("kind", KINDS)
def test_plain_equals_generate_on_random_models(kind: Kind) -> None:
    model = random_model(kind, dtype=torch.float64)
    prompt = ids(random.Random(kind), 40)
    generation = plain(prompt)
    run(engine_over(model), [generation])
    assert generation.token_ids == generate(model, prompt, TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_equals_each_alone(kind: Kind) -> None:
    model = random_model(kind, dtype=torch.float64)
    rng = random.Random(kind)
    cases: list[tuple[list[int], list[int] | None, float | None]] = []
    for length, strength in ((60, 0.5), (7, 2.0), (33, None), (18, 4.6487), (5, None)):
        base = None if strength is None else ids(rng, length // 2 + 1)
        cases.append((ids(rng, length), base, strength))
    generations = [
        plain(prompt) if base is None or strength is None else steered(prompt, base, strength)
        for prompt, base, strength in cases
    ]
    run(engine_over(model), generations)
    for generation, (prompt, base, strength) in zip(generations, cases, strict=True):
        expected = generate(model, prompt, TOKENS, base=base, strength=strength)
        assert generation.token_ids == expected


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_sampled_row_alone_equals_the_same_row_in_a_batch(kind: Kind) -> None:
    model = random_model(kind, dtype=torch.float64)
    rng = random.Random(kind)
    prompt, base, other = ids(rng, 30), ids(rng, 12), ids(rng, 50)
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01)

    def fresh() -> Generation:
        return steered(prompt, base, 2.0, sampling=sampling, seed=11, floor=0.05)

    alone, together, again = fresh(), fresh(), fresh()
    run(engine_over(model), [alone])
    neighbours = [
        plain(other, sampling=Sampling(temperature=1.5), seed=3),
        steered(other, prompt, 4.0, sampling=Sampling(temperature=0.7), seed=4),
    ]
    run(engine_over(model), [neighbours[0], together, neighbours[1]])
    run(engine_over(model), [again])
    assert together.token_ids == alone.token_ids == again.token_ids
    different = steered(prompt, base, 2.0, sampling=sampling, seed=12, floor=0.05)
    run(engine_over(model), [different])
    assert different.token_ids != alone.token_ids


def test_a_row_that_joins_a_running_batch_decodes_as_alone() -> None:
    model = random_model("qwen3", dtype=torch.float64)
    rng = random.Random(5)
    prompts = [ids(rng, n) for n in (12, 44, 25, 31)]
    engine = engine_over(model)
    first, second = plain(prompts[0]), steered(prompts[1], prompts[2], 2.0)
    late = steered(prompts[3], prompts[0], 0.5)
    engine.admit(first)
    engine.step()
    engine.admit(second)
    for _ in range(9):
        engine.step()
    engine.retire(first)  # its row is filled by another
    engine.admit(late)
    while engine.running:
        engine.step()
    assert second.token_ids == generate(model, prompts[1], TOKENS, base=prompts[2], strength=2.0)
    assert late.token_ids == generate(model, prompts[3], TOKENS, base=prompts[0], strength=0.5)
    assert first.token_ids == generate(model, prompts[0], TOKENS)[: len(first.token_ids)]
    assert engine.backend.nbytes == 0, "an empty batch holds no cache"


def test_several_preferences_equal_their_formula() -> None:
    model = random_model("llama", dtype=torch.float64)
    rng = random.Random(8)
    rows = [ids(rng, 20), ids(rng, 26), ids(rng, 9)]
    weights = [1.7, -0.6]
    generation = Generation(prompts=rows, weights=weights, max_new_tokens=24)
    run(engine_over(model), [generation])
    expected: list[int] = []
    for _ in range(24):
        logs = [model(torch.tensor([row + expected])).logits[0, -1].log_softmax(-1) for row in rows]
        score = logs[2] + sum(w * (p - logs[2]) for w, p in zip(weights, logs, strict=False))
        expected.append(int(score.argmax()))
    assert generation.token_ids == expected


@pytest.mark.parametrize("placement", ["system", "user"])
def test_smollm_equals_guidance_in_float32(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    packed_smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    placement: str,
) -> None:
    model, tokenizer = smollm
    chats = [
        ("Why is the sky blue?", "Answer in one short sentence.", 0.5),
        ("Name three fruits and say how each one tastes.", "Talk like a pirate.", 2.0),
        ("What should I pack for a week of hiking in the Alps in June?", "Be formal.", 4.6487),
        ("Tell me a joke.", None, None),
    ]
    generations, expected = [], []
    for question, preference, strength in chats:
        prompts = encode_chat(
            tokenizer,
            [{"role": "user", "content": question}],
            [Preference(preference)] if preference else [],
            placement,  # type: ignore[arg-type]
        )
        rows = [*prompts.preferred, prompts.base]
        weights = [] if strength is None else [1.0 + strength]
        end = frozenset({tokenizer.eos_token_id})
        generations.append(
            Generation(prompts=rows, weights=weights, max_new_tokens=SMOLLM_TOKENS, end_ids=end)
        )
        base = None if strength is None else prompts.base
        expected.append(generate(model, rows[0], SMOLLM_TOKENS, base=base, strength=strength))

    def copies() -> list[Generation]:
        return [
            Generation(
                prompts=g.prompts,
                weights=g.weights,
                max_new_tokens=SMOLLM_TOKENS,
                end_ids=g.end_ids,
            )
            for g in generations
        ]

    for engine_model in (model, packed_smollm[0]):
        alone, together = copies()[1], copies()
        run(engine_over(engine_model), [alone])
        assert alone.token_ids == expected[1]
        run(engine_over(engine_model), together)
        assert [generation.token_ids for generation in together] == expected
