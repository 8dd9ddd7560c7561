"""benchmarks/load.py on the tiny model: it finds nothing here, and finds what is planted."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest

from amulet import Amulet
from amulet.preference import DEFAULT_STEERING
from amulet.serve.app import create_app
from amulet.serve.limits import Limits
from benchmarks import load
from tests.serve.conftest import listening

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
NUMBER = 8


@pytest.fixture(scope="module")
def cases(tiny: Amulet) -> list[load.Case]:
    return load.make_cases(tiny, 12)


def test_cases_differ_in_preference_and_length(cases: list[load.Case]) -> None:
    assert len({str(case.body) for case in cases}) == len(cases) == 32
    assert sum(case.steered for case in cases) == 24
    assert {case.body["preference"] for case in cases if case.steered} == set(load.PREFERENCES)
    assert {len(case.ids) for case in cases} >= {3, 6, 9, 12}


async def test_a_sound_server_is_found_sound(tiny: Amulet, cases: list[load.Case]) -> None:
    app = create_app(tiny, limits=Limits(max_tokens=64))
    with listening(app) as (url, _):
        begun = time.monotonic()
        findings = await load.clients(url, cases, NUMBER, math.inf, each=4, seed=1)
        metrics = load.figures_of(url)
    outcome = load.Outcome(
        "float32", NUMBER, time.monotonic() - begun, findings, [(1.0, 9.0, 2.0)], metrics, 0
    )
    assert outcome.faults(exact=True) == []
    assert findings.ended.total() == 4 * NUMBER
    assert len(findings.ended) == 6  # of every kind of client
    assert findings.same == findings.compared >= NUMBER
    assert set(outcome.left) == {
        "rows",
        "cache_bytes",
        "requests_in_flight",
        "requests_waiting",
    }
    page = load.section(outcome, exact=True)
    assert "| **wrong answers** | **0** |" in page
    assert f"| the same to the token as alone | {findings.same} |" in page


async def test_a_wrong_answer_is_found(tiny: Amulet, cases: list[load.Case]) -> None:
    swapped = [
        replace(case, ids=other.ids, text=other.text, likely=other.likely)
        for case, other in zip(cases, cases[1:] + cases[:1], strict=True)
    ]
    with listening(create_app(tiny, limits=Limits(max_tokens=64))) as (url, _):
        findings = await load.clients(url, swapped, 2, math.inf, each=4)
    assert findings.wrong
    assert findings.same == 0


def test_how_far_an_answer_is_from_the_one_alone() -> None:
    case = load.Case({}, "ab", (1, 2), ({1: -0.1, 7: -2.0}, {2: -0.5, 3: -0.6}))
    assert case.distance([1, 2]) == 0
    assert case.distance([1, 3, 9]) == pytest.approx(0.1)
    assert case.distance([7, 2]) == pytest.approx(1.9)
    assert case.distance([8]) == float("inf")  # not considered
    assert case.distance([1]) == float("inf")  # ended early
    assert case.tie == 0.5
    push = DEFAULT_STEERING.strength * (1 + DEFAULT_STEERING.focus)
    assert replace(case, body={"preference": "x"}).tie == pytest.approx(0.5 * (1 + 2 * push))


def test_an_even_tie_is_not_the_same() -> None:
    case = load.Case({}, "a", (1,), ({1: -0.5, 2: -0.5},))
    findings = load.Findings()
    for ids, text in (([1], "a"), ([2], "b"), ([1], "torn")):
        findings.take(case, {"details": {"token_ids": ids}}, text, None)
    assert (findings.same, findings.distances, findings.compared) == (2, [0.0], 3)
    assert len(findings.wrong) == 1  # whose text is not that of its tokens


def test_exchanged_answers_are_found(cases: list[load.Case]) -> None:
    found, tried = load.exchanged(cases)
    assert found / tried > 0.9
    assert load.exchanged([cases[0], cases[0]]) == (0, 0)


def test_what_counts_as_a_fault() -> None:
    metrics = {
        "amulet_rows": 2.0,
        "amulet_cache_bytes": 0.0,
        "amulet_requests_in_flight": 0.0,
        "amulet_requests_waiting": 0.0,
        'amulet_requests_total{route="/v1/models",status="200"}': 5.0,
        'amulet_requests_total{route="/v1/models",status="503"}': 1.0,
    }
    findings = load.Findings(same=1, distances=[0.2], stuck=["x"])
    memory = [(float(at), 100.0 + at, 0.0) for at in range(61)]
    before = {'amulet_requests_total{route="/health",status="503"}': 4.0}
    metrics |= before  # while it was loading
    outcome = load.Outcome("bfloat16", 2, 60.0, findings, memory, metrics, 1, before)
    assert outcome.faults(exact=False) == [
        "stuck: x",
        "1 answers with a 5xx",
        "2 rows left",
        "the server ended with 1",
    ]
    assert "1 answers differ from those decoded alone" in outcome.faults(exact=True)
    assert outcome.growth == pytest.approx(60.0)
