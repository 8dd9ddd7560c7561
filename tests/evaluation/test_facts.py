"""The facts are sound, and a model is scored by the likeliest option."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amulet import Amulet, Request, Steering
from amulet.errors import EvaluationError
from amulet.evaluation import facts as module
from amulet.evaluation.facts import (
    Fact,
    _Asked,
    _likelihood,
    _options,
    facts,
    right_answers,
    score_facts,
)
from amulet.evaluation.methods import parse_method, parse_methods
from amulet.evaluation.pairs import divergence
from amulet.evaluation.paper import preferences_of
from amulet.evaluation.run import Meta, MethodMeta, Run
from amulet.evaluation.scoring import Scores, answer_log_probabilities, score_continuations
from tests.backends.test_contract import mamba
from tests.models import Kind, byte_tokenizer, random_model

TEA = Fact(question="What is tea?", options=("a drink", "a stone", "a song", "a hat"))


def test_the_facts_are_many_and_their_options_differ() -> None:
    found = facts()
    assert len(found) == 76
    assert len({fact.question for fact in found}) == 76
    for fact in found:
        assert len({option.lower() for option in fact.options}) == 4
        assert fact.question.endswith("?")


def test_the_likeliest_option_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    amulet = Amulet(random_model("llama"), byte_tokenizer())
    rows = iter([(-1.0, -2.0, -3.0, -1.5), (-2.0, -1.0, -3.0, -4.0), (-1.0, -1.0, -3.0, -1.5)])

    def options(*_: object) -> list[Scores]:
        return [Scores(torch.tensor([0]), torch.full((1, 1, 1), mean)) for mean in next(rows)]

    monkeypatch.setattr(module, "_options", options)
    assert right_answers(amulet, given=facts()[:3]) == [True, False, False], "a tie is no answer"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_options_score_as_answers_do(kind: Kind) -> None:
    """Asked together after one pass over the prompt, or each by itself: the same."""
    amulet = Amulet(random_model(kind), byte_tokenizer())
    messages = [{"role": "user", "content": "What is tea?"}]
    for preferences in (None, ("Be brief.",), ("Be brief.", "Be kind.")):
        own = _options(amulet, TEA, _Asked(preferences, "user"), "", {})
        wish = None if preferences is None else list(preferences)
        request = Request(messages=messages, preference=wish, placement="user", focus=0.0)
        for option, scores in zip(("A drink", "A stone", "A song", "A hat"), own, strict=True):
            expected = answer_log_probabilities(amulet, request, list(option.encode()))
            assert scores.token_ids.tolist() == expected.token_ids.tolist()
            assert scores.preferences == expected.preferences
            torch.testing.assert_close(scores.rows, expected.rows, atol=1e-4, rtol=0)


def test_options_of_a_model_that_begins_its_state_anew() -> None:
    subject = mamba()
    prompt, answers = [3, 1, 4, 1, 5], [[9, 2, 6], [5], [3, 5, 8, 9]]
    amulet: Any = SimpleNamespace(model=subject.backend.model)
    for answer, found in zip(answers, score_continuations(amulet, prompt, answers), strict=True):
        rows = [subject.logits([*prompt, *answer[:n]]) for n in range(len(answer))]
        # Its state is float32 whatever the model is.
        torch.testing.assert_close(
            found, torch.stack(rows).float().log_softmax(-1), rtol=0, atol=1e-4
        )


def test_steering_moves_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    amulet = Amulet(random_model("llama"), byte_tokenizer())
    asked, means = [], []

    def spy(one: Amulet, fact: Fact, under: Any, prompt: str, known: Any) -> list[Scores]:
        asked.append(under)
        found = _options(one, fact, under, prompt, known)
        means.append([float(scores.steered(3.0).mean()) for scores in found])
        return found

    monkeypatch.setattr(module, "_options", spy)
    told: list[tuple[int, int]] = []
    steering = Steering(strength=3.0, floor=0.9, placement="user", focus=0.0)
    given = facts()[:4]
    right = right_answers(amulet, "Be brief.", steering, given, lambda *c: told.append(c))
    assert asked == [_Asked(("Be brief.",), "user")] * 4
    assert right == [own[0] == max(own) for own in means]  # of the mean, without the floor
    assert told == [(count, 4) for count in (1, 2, 3, 4)]
    with pytest.raises(EvaluationError, match=r"^steering=3\.0: expected Steering\("):
        right_answers(amulet, "Be brief.", 3.0)  # type: ignore[arg-type]


METHODS = (
    "base",
    "pref",
    "ours:strength=3,placement=user,focus=0",
    "ours:strength=3,placement=user,adapt=jsd",
    "ours:strength=3,placement=user,adapt=decay",
    "ours:strength=3,focus=0,adapt=separate",
    "ours:strength=3,adapt=opposite",
)
MORE = (TEA, Fact(question="What flies?", options=("a bird", "a stone", "a house", "a shoe")))


def make_run(folder: Path) -> Run:
    methods = [
        MethodMeta(**method.model_dump(exclude={"kind"})) for method in parse_methods(METHODS)
    ]
    return Run.create(
        folder,
        Meta(
            model="m",
            dtype="float32",
            settings={"system_prompt": "Be an assistant."},
            preferences=tuple(preferences_of(["concise", "concise+formal"])),
            methods=tuple(methods),
        ),
    )


def test_every_method_of_a_run_is_asked_once(tiny: Amulet, tmp_path: Path) -> None:
    run, told = make_run(tmp_path / "run"), list[tuple[int, int]]()
    score_facts(run, tiny, lambda *counts: told.append(counts), MORE)
    found = run.facts()
    names = [method.name for method in run.meta.methods]
    wishes = ("concise", "concise+formal")
    assert set(found) == {("base", "")} | {(m, w) for m in names[1:-1] for w in wishes}
    assert {tuple(right) for right in found.values()} == {("What is tea?", "What flies?")}
    assert told == [(0, 2), (1, 2), (2, 2)]
    path = run.folder / "facts.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    score_facts(run, tiny, given=MORE)
    assert run.facts() == found
    score_facts(run, tiny, given=MORE)  # nothing is left to ask
    assert len(path.read_text().splitlines()) == len(lines)


def test_a_runs_facts_are_asked_as_its_answers_were(
    tiny: Amulet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[_Asked, list[Scores]] = {}
    prompts: list[str] = []

    def spy(amulet: Amulet, fact: Fact, under: _Asked, prompt: str, known: Any) -> list[Scores]:
        prompts.append(prompt)
        seen[under] = _options(amulet, fact, under, prompt, known)
        return seen[under]

    monkeypatch.setattr(module, "_options", spy)
    run = make_run(tmp_path / "run")
    score_facts(run, tiny, given=[TEA])
    assert set(prompts) == {"Be an assistant."}
    texts = {name: preferences_of([name])[0].text for name in ("concise", "formal")}
    assert _Asked(tuple(texts.values()), "user") in seen  # separate: two texts, a row for each
    own = seen[_Asked((texts["concise"],), "user")]
    constant, jsd, decay = (parse_method(name) for name in METHODS[2:5])
    p, r = own[0].rows
    steps = torch.arange(len(p))[:, None]
    for method, strength in (
        (constant, torch.tensor(3.0)),
        (jsd, 3.0 * divergence(p, r)),
        (decay, 3.0 * 2.0 ** (-steps / 32)),
    ):
        logs = (p + strength * (p - r)).log_softmax(-1)
        mean = float(logs.gather(-1, own[0].token_ids[:, None]).mean())
        assert _likelihood(own[0], method) == pytest.approx(mean, abs=1e-4)
        likeliest = max(range(4), key=lambda i: _likelihood(own[i], method))
        assert run.facts()[method.name, "concise"] == {"What is tea?": likeliest == 0}
