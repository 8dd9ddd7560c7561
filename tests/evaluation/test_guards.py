"""Guards on texts whose repetition and meaning are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet import Amulet
from amulet.errors import EvaluationError
from amulet.evaluation.guards import (
    distinct_3,
    longest_repeat,
    score_guards,
    similarities,
)
from amulet.evaluation.judging import JudgeOptions
from amulet.evaluation.run import Answer, Meta, Run


@pytest.mark.parametrize(
    ("text", "share", "longest"),
    [
        ("", 1.0, 0),
        ("one two", 1.0, 0),
        ("a b c d", 1.0, 0),
        ("a b c a b c", 3 / 4, 3),
        ("tea tea tea tea tea", 1 / 3, 2),
        ("He said it. he said it!", 3 / 4, 3),
        ("1. 1. 1. 1. 1.", 1 / 3, 2),
        ("1. use tea 2. use tea 3. use tea", 2 / 4, 2),
        ("😀😀😀😀😀", 1 / 3, 2),
        ("❤️❤️❤️❤️❤️", 1 / 3, 2),
        ("!!!!!!!!", 1 / 3, 2),
        ("So:\n- \n- \n- \n- \n- \n- \n- \n-", 2 / 4, 2),
        ("- **a**: x\n- **b**: y\n- **c**: z", 1.0, 0),
        ("Wait... what?! | - | - |", 1.0, 0),
    ],
)
def test_repetition(text: str, share: float, longest: int) -> None:
    assert distinct_3(text) == pytest.approx(share)
    assert longest_repeat(text) == longest


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_the_longest_repeat_is_what_a_search_finds(letters: list[str]) -> None:
    n = len(letters)
    found = max(
        (
            k
            for k in range(1, n // 2 + 1)
            for i in range(n - 2 * k + 1)
            for j in range(i + k, n - k + 1)
            if letters[i : i + k] == letters[j : j + k]
        ),
        default=0,
    )
    assert longest_repeat(" ".join(letters)) == found


def test_similarity_follows_the_meaning() -> None:
    same, near, far = similarities(
        [
            ("Tea is a hot drink.", "Tea is a hot drink."),
            ("Tea is a hot drink.", "Tea is a warm beverage made of leaves."),
            ("Tea is a hot drink.", "The parliament voted on the new law."),
        ]
    )
    assert same == pytest.approx(1.0, abs=1e-5)
    assert same > near > 0.6 > 0.2 > far


def answer_of(method: str, text: str, ids: tuple[int, ...], known: float | None) -> Answer:
    return Answer(
        key=f"small/0/concise/{method}",
        set="small",
        index=0,
        question="What is tea?",
        preference="concise",
        preference_text="Be concise.",
        method=method,
        strength=None,
        floor=None,
        placement=None,
        adapt=None,
        seed=0,
        answer=text,
        token_ids=ids,
        finish_reason="length" if method == "beam" else "stop",
        changed=None,
        log_probability=known,
        seconds=0.0,
    )


def test_guards_ask_the_model_where_an_answer_came_without_its_likelihood(
    tiny: Amulet, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", Meta(model="m", dtype="float32"))
    with run.locked():
        run.append_answer(
            answer_of("base", "Tea is hot.", (84, 101, 97), -0.5),
            answer_of("pref", "Tea is hot.", (84, 101, 97), None),
            answer_of("beam", "tea tea tea tea", (116, 101), None),
            answer_of("ours", "", (), None),
        )
    with pytest.raises(EvaluationError, match=r"concise/pref has no log-probability"):
        score_guards(run, JudgeOptions())
    told: list[tuple[int, int]] = []
    score_guards(run, JudgeOptions(amulet=tiny), lambda *counts: told.append(counts))
    assert told == [(4, 4)]
    found = {key.rsplit("/", 1)[1]: values for key, values in run.scores("guards").items()}
    assert found["base"]["log_probability"] == -0.5
    assert found["pref"]["log_probability"] < 0
    assert found["pref"]["similarity"] == pytest.approx(1.0, abs=1e-5)
    assert found["beam"]["distinct_3"] == 0.5
    assert {name: found["beam"][name] for name in ("cut", "empty", "words", "longest_repeat")} == {
        "cut": 1.0,
        "empty": 0.0,
        "words": 4.0,
        "longest_repeat": 2.0,
    }
    assert found["ours"]["empty"] == 1.0
    assert "log_probability" not in found["ours"]
    assert "similarity" not in found["ours"]


def test_the_likelihood_is_the_one_that_decoding_saw(tiny: Amulet, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is tea?"}]
    reply = tiny.chat(messages, max_new_tokens=8, trace=True)
    assert reply.trace is not None
    run = Run.create(tmp_path / "run", Meta(model="m", dtype="float32"))
    with run.locked():
        run.append_answer(answer_of("base", "x", reply.token_ids, None))
    score_guards(run, JudgeOptions(amulet=tiny))
    [values] = run.scores("guards").values()
    seen = sum(token.base for token in reply.trace) / len(reply.trace)
    assert values["log_probability"] == pytest.approx(seen, abs=1e-4)
