"""The next token: what processors permit, what a model excludes, what can't be chosen from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from amulet import Amulet, DecodeError, Grammar, Request
from amulet.decoding.choice import _repeated, choose_tokens
from amulet.decoding.generation import Generation
from amulet.decoding.sampling import Sampling
from tests.models import IM_END, random_model

NEVER = float("-inf")
DIGITS = list(range(ord("0"), ord("9") + 1))
QUESTION = [{"role": "user", "content": "How many?"}]
WISH = {"preference": "Talk like a pirate.", "strength": 2.0, "floor": 0.1}
# One row each: the preferred prompt's logits, then the base prompt's.
PREFERRED = [5.0, 4.0, 1.0, 0.9, -3.0]
BASE = [4.0, 5.0, 1.5, 0.2, -3.0]

Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def choose(
    rows: Sequence[Sequence[float]], *, others: Sequence[Generation] = (), **options: Any
) -> Generation:
    """Choose one token from given logits; plain rows of other generations come behind."""
    weights = [3.0] * (len(rows) - 1)
    made = Generation(prompts=[[0]] * len(rows), **{"weights": weights, **options})
    logits = torch.tensor([*rows, *[BASE] * len(others)])
    ids, _ = choose_tokens([made, *others], logits, range(len(logits)))
    if made.error is None:
        made.token_ids.append(ids[0])
    for other, token_id in zip(others, ids[1:], strict=True):
        other.token_ids.append(token_id)
    return made


def only(*ids: int, low: float = NEVER) -> Process:
    """Return a processor that permits some ids alone, or lowers the others."""

    def process(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lowered = torch.full_like(scores, low) if low == NEVER else scores + low
        lowered[:, list(ids)] = scores[:, list(ids)]
        return lowered

    return process


@pytest.mark.parametrize("low", [NEVER, torch.finfo(torch.float32).min, -1e9, -1e4, -100.0])
def test_the_floor_is_relative_to_what_processors_permit(low: float) -> None:
    """2 is implausible beside 0 and 1, but the likeliest of what is permitted; 4 is not."""
    made = Generation(
        prompts=[[0], [0]], weights=[3.0], floor=0.1, processors=[only(2, 3, 4, low=low)]
    )
    ids, mix = choose_tokens([made], torch.tensor([PREFERRED, BASE]), [0, 1])
    assert ids == [3], "r + 3 (p - r) prefers 3 to 2"
    assert (mix.scores[0] > NEVER).tolist() == [True, True, True, True, False]


def test_grammar_and_processors_permit_together() -> None:
    mask = torch.tensor([True, False, True, False, False])
    made = choose([PREFERRED, BASE], floor=1.0, processors=[only(1, 2)], allowed=lambda: mask)
    assert made.token_ids == [2]
    other = Generation(prompts=[[0]])
    made = choose([PREFERRED, BASE], others=[other], processors=[only(1, 3)], allowed=lambda: mask)
    assert isinstance(made.error, DecodeError)
    assert "forbid every one" in str(made.error)
    assert other.error is None
    assert other.token_ids == [1]


def test_a_processor_cannot_permit_what_the_grammar_forbids() -> None:
    def force(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(5) == 4, 1e9, scores)

    mask = torch.tensor([True, True, False, False, False])
    assert choose([PREFERRED, BASE], processors=[force], allowed=lambda: mask).token_ids == [0]


@pytest.mark.parametrize("high", [100.0, 1e9, float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_token_passes_the_floor(high: float, temperature: float) -> None:
    def force(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(5) == 4, high, scores)

    made = Generation(
        prompts=[[0], [0]],
        weights=[3.0],
        floor=0.5,
        processors=[force],
        sampling=Sampling(temperature=temperature),
    )
    made.generator = torch.Generator().manual_seed(0)
    ids, _ = choose_tokens([made], torch.tensor([PREFERRED, BASE]), [0, 1])
    assert made.error is None
    assert ids == [4]


def test_a_processor_that_warps_leaves_the_floor_as_it_is() -> None:
    rows = [[5.0, 4.9, -8.0], [5.0, 5.0, -40.0]]  # 2 gains most by steering
    warper = TemperatureLogitsWarper(2.0)
    assert choose(rows, floor=0.1).token_ids == [0]
    assert choose(rows, floor=0.1, processors=[warper]).token_ids == [0]
    assert choose(rows, floor=0.0, processors=[warper]).token_ids == [2]


class MeanLess(LogitsProcessor):
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, self.value)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([[float("nan")] * 5, BASE], {}, "float16"),
        ([PREFERRED, [*BASE[:4], float("nan")]], {}, "float16"),
        ([PREFERRED, [*BASE[:4], float("inf")]], {}, "float16"),
        ([[*BASE[:4], float("inf")]], {}, "float16"),
        ([[NEVER] * 5, BASE], {}, "float16"),
        ([[NEVER] * 5], {}, "float16"),
        ([PREFERRED, BASE], {"processors": [MeanLess(NEVER)]}, "forbid every one"),
        ([PREFERRED, BASE], {"processors": [MeanLess(float("nan"))]}, "every logits processor"),
        ([PREFERRED, BASE], {"allowed": lambda: torch.zeros(5, dtype=torch.bool)}, "forbid"),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_cannot_be_chosen_from_ends_that_generation_only(
    rows: list[list[float]], options: dict[str, Any], said: str, floor: float, temperature: float
) -> None:
    good = Generation(prompts=[[0]])
    made = Generation(
        prompts=[[0]] * len(rows),
        weights=[3.0] * (len(rows) - 1),
        floor=floor,
        sampling=Sampling(temperature=temperature),
        **options,
    )
    made.generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([*rows, BASE])
    ids, _ = choose_tokens([made, good], logits, range(len(logits)))
    assert isinstance(made.error, DecodeError)
    assert said in str(made.error)
    assert good.error is None
    assert ids[1] == 1


@pytest.mark.parametrize("weights", [[1.0], [0.5], [3.0], [-2.0]])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("exact", [True, False])
def test_what_the_model_excludes_is_never_chosen(
    weights: list[float], floor: float, exact: bool
) -> None:
    """-inf in one row or in all, as for the padding of a vocabulary."""
    processors = [TemperatureLogitsWarper(1.0)] if exact else []
    rows = [[1.0, 2.0, NEVER, NEVER, 0.0], [2.0, 1.0, NEVER, 3.0, NEVER]]
    made = Generation(prompts=[[0], [0]], weights=weights, floor=floor, processors=processors)
    ids, mix = choose_tokens([made], torch.tensor(rows), [0, 1])
    assert made.error is None
    assert ids[0] in (0, 1)
    assert (mix.scores[0, 2:] == NEVER).all()
    assert not mix.scores.isnan().any()
    two = Generation(prompts=[[0]] * 3, weights=[*weights, 0.3], floor=floor, trace=True)
    ids, mix = choose_tokens([two], torch.tensor([rows[0], *rows]), [0, 1, 2])
    assert (mix.scores[0, 2:] == NEVER).all()
    trace = mix.trace(0, ids[0], 5)
    assert trace.steered > NEVER
    assert [value for _, value in trace.top[2:]] == [NEVER] * 3


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 1e-45, 1e-320, 5e-324])
def test_the_least_temperatures_are_greedy(temperature: float) -> None:
    assert choose([PREFERRED], sampling=Sampling(temperature=temperature)).token_ids == [0]
    assert choose([BASE], sampling=Sampling(temperature=temperature)).token_ids == [1]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=5e-324),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=100.0, top_k=1, top_p=1e-45, min_p=1.0),
        Sampling(temperature=1e-5, top_p=1 - 1e-16, min_p=5e-324),
    ],
)
def test_the_ends_of_the_samplers_ranges(sampling: Sampling) -> None:
    made = Generation(prompts=[[0]], sampling=sampling)
    made.generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[3.0, NEVER, 9.0, NEVER]])
    assert choose_tokens([made], logits, [0])[0] == [2]


# Through the whole engine


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    from tests.models import byte_tokenizer

    return Amulet(random_model("llama", seed=5), byte_tokenizer())


@pytest.mark.parametrize("wish", [{}, WISH])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("low", [NEVER, -1e9])
def test_digits_alone(amulet: Amulet, wish: dict[str, Any], temperature: float, low: float) -> None:
    reply = amulet.chat(
        QUESTION,
        logits_processor=only(*DIGITS, low=low),
        max_new_tokens=12,
        temperature=temperature,
        seed=1,
        **wish,
    )
    assert len(reply.text) == 12
    assert reply.text.isdigit()


def test_processors_of_transformers_hold_under_a_floor(amulet: Amulet) -> None:
    prompt = len(amulet.encode_chat(QUESTION))
    plain = amulet.chat(QUESTION, max_new_tokens=20, **WISH).token_ids
    bad = amulet.chat(
        QUESTION,
        max_new_tokens=20,
        logits_processor=NoBadWordsLogitsProcessor([[i] for i in set(plain)]),
        **WISH,
    )
    assert not set(bad.token_ids) & set(plain)
    answers: list[int] = []

    def next_ids(_: int, ids: torch.Tensor) -> list[int]:
        answers.append(len(ids) - prompt)
        return [65 + len(answers), IM_END]

    prefix = amulet.chat(
        QUESTION,
        max_new_tokens=4,
        logits_processor=[
            PrefixConstrainedLogitsProcessor(next_ids, 1),
            MinNewTokensLengthLogitsProcessor(prompt, 4, IM_END),
        ],
        **WISH,
    )
    assert prefix.text == "BCDE"
    assert answers == [0, 1, 2, 3], "what the processor sees before the answer is encode_chat's"
    grams = amulet.chat(
        QUESTION,
        max_new_tokens=40,
        logits_processor=LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)]),
        **WISH,
    ).token_ids
    assert len(set(grams)) == len(grams)


@pytest.mark.parametrize("wish", [{}, WISH])
def test_a_grammar_that_the_processors_leave_nothing_of(
    amulet: Amulet, wish: dict[str, Any]
) -> None:
    request = {"messages": QUESTION, "max_new_tokens": 4, **wish}
    impossible = {
        **request,
        "grammar": Grammar.regex("[a-c]+"),
        "steer_grammar": True,
        "logits_processor": only(*DIGITS),
    }
    alone = amulet.chat(**request).token_ids
    bad, good = amulet.batch([impossible, request], return_exceptions=True)
    assert isinstance(bad, DecodeError)
    assert "grammar and logits processors" in str(bad)
    assert not isinstance(good, DecodeError)
    assert good.token_ids == alone


def test_nan_weights_are_an_error_and_the_object_stays_usable(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = random_model("llama")
    amulet = Amulet(model, tokenizer)
    good = amulet.chat(QUESTION, max_new_tokens=4).token_ids
    head = model.get_output_embeddings().weight.data
    kept = head.clone()
    head[7] = float("nan")
    for options in ({}, WISH, {"temperature": 1.0}, {"floor": 0.0, "preference": "A"}):
        with pytest.raises(DecodeError, match="not finite numbers"):
            amulet.chat(QUESTION, max_new_tokens=4, **options)
    head.copy_(kept)
    assert amulet.chat(QUESTION, max_new_tokens=4).token_ids == good


def test_an_overflow_in_float16_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(6e4)
    with pytest.raises(DecodeError, match='dtype="bfloat16"'):
        Amulet(model, tokenizer).chat(QUESTION, max_new_tokens=8)


def penalised(
    model: Any, prompt: list[int], rows: list[list[int]], count: int, normal: bool
) -> list[int]:
    """Decode by whole passes; the penalty counts the prompt and the answer."""
    got: list[int] = []
    process = RepetitionPenaltyLogitsProcessor(2.0)
    for _ in range(count):
        with torch.no_grad():
            logs = [model(torch.tensor([row + got])).logits[0, -1] for row in rows]
        if normal:
            logs = [log.log_softmax(-1) for log in logs]
        mixed = logs[0] if len(rows) == 1 else logs[1] + 3.0 * (logs[0] - logs[1])
        got.append(int(process(torch.tensor([prompt + got]), mixed[None])[0].argmax()))
    return got


@pytest.mark.parametrize("strength", [2.0, 0.0])
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("own", [True, False])
def test_the_penalty_counts_no_word_of_the_preference(
    amulet: Amulet, strength: float, trace: bool, own: bool
) -> None:
    """Whether the base prompt has a row or not, and by Transformers' processor as well."""
    options: dict[str, Any] = {
        "preference": "".join(map(chr, range(33, 127))),
        "strength": strength,
        "floor": 0.0,
        "focus": 0.0,
        "loop_guard": 0,
    }
    rows = [
        list(p) for p in amulet.prepare(Request(messages=QUESTION, **options)).generation.prompts
    ]
    base = amulet.encode_chat(QUESTION)
    rows = [rows[0], base] if strength else [rows[0]]
    given: dict[str, Any] = (
        {"repetition_penalty": 2.0}
        if own
        else {"logits_processor": RepetitionPenaltyLogitsProcessor(2.0)}
    )
    reply = amulet.chat(QUESTION, max_new_tokens=16, trace=trace, **given, **options)
    # One row's scores are its logits, as in Transformers; several rows' are log-probabilities.
    got = penalised(amulet.model, base, rows, 16, normal=trace or len(rows) > 1)
    assert list(reply.token_ids) == got


def test_the_loop_guard_counts_what_is_steered_alone() -> None:
    generation = Generation(prompts=[[1], [2]], weights=[1.5], loop_guard=1)
    assert _repeated(generation) == {}
    generation.token_ids += [5, 6, 5]
    assert _repeated(generation) == {6: pytest.approx(0.8)}
    generation.weights = [0.0]  # a tool call, say: it may repeat what it likes
    generation.token_ids += [6, 5]
    assert _repeated(generation) == {}
    generation.weights = [1.5]
    assert _repeated(generation) == {}, "what is said behind the call begins anew"
    generation.token_ids += [5, 6]
    assert _repeated(generation) == {}
    generation.token_ids += [5]
    assert _repeated(generation) == {6: pytest.approx(0.8)}
    generation.loop_guard = 0
    assert _repeated(generation) == {}
