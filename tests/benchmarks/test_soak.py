"""benchmarks/soak.py: it finds nothing here, and finds what is planted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from amulet import Amulet
from amulet.serve.app import create_app
from benchmarks import soak
from tests.serve.conftest import listening

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Amulet:
    folder = tmp_path_factory.mktemp("model")
    soak.tiny_model(folder)
    return Amulet.from_pretrained(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def url(tiny: Amulet) -> Iterator[str]:
    with listening(create_app(tiny), keep_alive=True) as (url, _):
        yield url


@pytest.fixture(scope="module")
def cases(tiny: Amulet) -> list[list[soak.Case]]:
    return soak.make_cases(tiny, 4, 6)


def test_cases_are_of_all_kinds_and_each_users_own(cases: list[list[soak.Case]]) -> None:
    for user, own in enumerate(cases):
        assert len(own) == 4
        assert {marker for case in own for marker in soak.MARKER.findall(str(case.body))} == {
            f"zq{user:03d}x"
        }
    flat = [case for own in cases for case in own]
    assert sum("tools" in case.body for case in flat) == 1
    assert sum(case.path == soak.TEXT for case in flat) == 3
    assert sum("preference" in case.body for case in flat) == 12
    assert json.loads(cases[0][3].said)["city"] in soak.CITIES


async def test_a_sound_server_is_found_sound(url: str, cases: list[list[soak.Case]]) -> None:
    findings, took, memory = await soak.load(url, cases, 2.0, seed=1)
    assert findings.wrong == []
    assert findings.checked > 16
    assert took >= 2.0
    assert len(memory) == soak.LOOKS + 1
    assert min(memory) > 0


@pytest.mark.parametrize("kind", ["whole", "stream", "log-probabilities"])
async def test_another_answer_is_found(
    url: str, cases: list[list[soak.Case]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "KINDS", {kind: 1})
    chats = [case for own in cases for case in own if case.path == soak.CHAT and case.said]
    wrong = [[replace(case, said=case.said + "x")] for case in chats[:2]]
    findings, *_ = await soak.load(url, wrong, 0.2, seed=1)
    assert findings.checked == len(findings.wrong) > 2
    assert "instead of" in findings.wrong[0]


async def test_another_users_marker_is_found(url: str, cases: list[list[soak.Case]]) -> None:
    told = replace(cases[0][0], marker="zq999x")
    with pytest.raises(AssertionError, match=r"zq000x.*another user's"):
        soak.User._own(told, f"... {cases[0][0].marker} ...")
    soak.User._own(cases[0][0], f"... {cases[0][0].marker} ...")


def test_what_counts_as_a_fault() -> None:
    left = {"rows": 0.0}
    sound = soak.Outcome(
        "m", 2, 9.0, soak.Findings(), [80.0, 90.0, 100.0, 104.0], 0.0, left, 0, 0, 0
    )
    assert sound.faults == []
    wrong = soak.Findings(wrong=["x"])
    bad = replace(
        sound,
        findings=wrong,
        memory=[80.0, 90.0, 100.0, 106.0],
        errors=1.0,
        leaks=2,
        mistakes=1,
        exit_code=1,
    )
    assert replace(bad, left={"rows": 3.0}).faults == [
        "m: wrong: x",
        "m: 1 answers with a 5xx",
        "m: memory grew from 100 to 106 MiB",
        "m: 3 rows left",
        "m: 2 markers in the server's log",
        "m: 1 errors in the server's log",
        "m: the server ended with 1",
    ]


@pytest.mark.slow
def test_a_short_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Memory settles in minutes, not in seconds.
    monkeypatch.setattr(soak, "GROWTH", 0.5)
    result = soak.main(["--clients", "8", "--seconds", "5", "--embedded-seconds", "0"])
    out = capsys.readouterr().out
    assert result["faults"] == []
    assert result["checked"] == result["runs"]["tiny"]["checked"] >= 32
    assert json.loads(out.splitlines()[-1]) == json.loads(json.dumps(result))
    assert "| **5xx** | **0** |" in out
    assert "Everything held." in out
