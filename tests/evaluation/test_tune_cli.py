"""`amulet tune`: the files that it writes, what it prints and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import typer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from amulet import Amulet, Preference, Steering
from amulet.evaluation.rules import RULES
from amulet.evaluation.tune_cli import register
from amulet.serve.store import Store
from tests.docs.pages import DOCS, blocks
from tests.models import ScriptedModel

SHORT, LONG = "Tea.", "Tea is a leaf in hot water. Tea is a leaf in hot water."


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Note what the command loads as the embedded model."""
    return []


@pytest.fixture
def scripted(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, loaded: list[object]
) -> Amulet:
    """A model that is brief where "short" stands in its prompt, as the embedded one."""
    amulet = Amulet(ScriptedModel(tokenizer, {"short": SHORT, "": LONG}), tokenizer)
    use(amulet, monkeypatch, loaded)
    return amulet


def use(amulet: Amulet, monkeypatch: pytest.MonkeyPatch, loaded: list[object]) -> None:
    def embedded(cls: type[Amulet], **options: object) -> Amulet:
        loaded.append(options)
        return amulet

    monkeypatch.setattr(Amulet, "embedded", classmethod(embedded))


def run(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)  # with a callback, `tune` stays a command of its own
    return CliRunner(env={"COLUMNS": "120", "TERM": "dumb"}).invoke(
        app, ["tune", *map(str, arguments)]
    )


def test_rules_choose_a_setting_and_write_it(
    scripted: Amulet, loaded: list[object], question_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "steering.json"
    result = run(
        *("--out", out, "--questions", question_file, "--preferences", "one-sentence"),
        *("--strength", 1, "--strength", 2, "--floor", 0.1, "--placement", "user"),
        *("--focus", 0, "--focus", 2, "--loop-guard", 3),
        *("--limit", 2, "--max-new-tokens", 60, "--max-log-probability-fall", 100),
        *("--dtype", "float32"),
    )
    assert result.exit_code == 0, result.output
    assert loaded == [{"device": None, "dtype": "float32"}]
    steering = Steering.model_validate_json(out.read_text(encoding="utf-8"))
    lines = [line.split() for line in result.stdout.splitlines()]
    settings = ["strength", "floor", "placement", "focus", "loop_guard"]
    assert lines[0] == [*settings, "answers", "score", "fall", "distinct"]
    assert lines[1][:6] == ["0", "0", "user", "1", "4", "2"]
    assert sorted(line[:5] for line in lines[2:6]) == [
        [strength, "0.1", "user", focus, "3"] for strength in "12" for focus in "02"
    ]
    # The scripted model heeds the prompt alone, so nothing beats it and nothing is pushed.
    assert steering == Steering(strength=0.0, floor=0.0)
    assert lines[1][6:] == ["1.000", "0.000", "0.000", "chosen"]
    assert lines[-1] == ["Written:", str(out)]


def test_the_documented_command_runs(
    scripted: Amulet, question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    question_file.rename("questions.json")
    [command] = [
        line
        for block in blocks(DOCS / "tune.md", "bash")
        for line in block.text.splitlines()
        if "--questions" in line
    ]
    words = shlex.split(command)
    assert words[:2] == ["amulet", "tune"]
    result = run(*words[2:])
    assert result.exit_code == 0, result.output
    assert Steering.model_validate_json((tmp_path / "steering.json").read_text("utf-8"))


def test_the_rules_are_listed_with_what_they_check(loaded: list[object]) -> None:
    result = run("--list-rules")
    assert result.exit_code == 0, result.output
    listed = [line.split()[0] for line in result.stdout.splitlines()[1:] if line[:1].strip()]
    assert listed == list(RULES)
    assert "ten words at most" in result.stdout
    assert loaded == []


def test_thumbs_give_a_strength(
    tiny: Amulet, monkeypatch: pytest.MonkeyPatch, loaded: list[object], tmp_path: Path
) -> None:
    use(tiny, monkeypatch, loaded)
    thumbs, out = tmp_path / "thumbs.jsonl", tmp_path / "steering.json"
    thumbs.write_text("".join(thumb(["Be brief."]) for _ in range(3)), encoding="utf-8")
    result = run("--thumbs", thumbs, "--out", out, "--placement", "user")
    assert result.exit_code == 0, result.output
    steering = Steering.model_validate_json(out.read_text(encoding="utf-8"))
    assert steering.placement == "user"
    assert "Be brief." in result.stdout
    assert "of 3 thumbs are predicted by the others." in result.stdout
    assert "Fitted with focus 1 and loop guard 4, those of most thumbs." in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steering.json", "thumbs.jsonl"]


def test_a_servers_file_gives_one_users_strength(
    tiny: Amulet, monkeypatch: pytest.MonkeyPatch, loaded: list[object], tmp_path: Path
) -> None:
    use(tiny, monkeypatch, loaded)
    file, out = tmp_path / "thumbs.sqlite", tmp_path / "steering.json"
    store = Store(file)
    for user, liked in (("ann", "So."), ("bob", "No.")):
        for answer in ("So.", "No."):
            chat = [{"role": "user", "content": "Why?"}]
            kept = {"messages": chat, "preferences": ["Be brief."], "answer": answer}
            thumb = {**kept, "thumb": "up" if answer == liked else "down"}
            assert store.put_thumb(user, answer, thumb, most=2)
    weights = {}
    for user in ("ann", "bob"):
        result = run("--thumbs", file, "--user", user, "--out", out, "--placement", "user")
        assert result.exit_code == 0, result.output
        assert "of 1 thumbs are predicted by the others." in result.stdout
        weights[user] = Steering.model_validate_json(out.read_text(encoding="utf-8")).strength
    store.close()
    middle = tiny.steering.strength  # they like the opposite, so one pulls up and one down
    assert min(weights.values()) < middle < max(weights.values())
    assert "of 2 thumbs" in run("--thumbs", file, "--out", out, "--placement", "user").stdout


def test_several_preferences_get_weights_in_a_file_beside_it(
    tiny: Amulet, monkeypatch: pytest.MonkeyPatch, loaded: list[object], tmp_path: Path
) -> None:
    use(tiny, monkeypatch, loaded)
    thumbs, out = tmp_path / "thumbs.jsonl", tmp_path / "steering.json"
    thumbs.write_text(thumb(["Be brief.", "Be kind."]) * 2, encoding="utf-8")
    result = run("--thumbs", thumbs, "--out", out, "--placement", "system")
    assert result.exit_code == 0, result.output
    beside = tmp_path / "steering.preferences.json"
    found = [Preference.model_validate(one) for one in json.loads(beside.read_text("utf-8"))]
    assert [preference.text for preference in found] == ["Be brief.", "Be kind."]
    assert f"Written: {out}, {beside}" in result.stdout


def thumb(preferences: list[str]) -> str:
    pair = {"question": "Why?", "preferences": preferences, "a": "So.", "b": "No.", "chosen": "a"}
    return json.dumps(pair) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Expected either --questions with --preferences, or --thumbs alone."),
        (("--preferences", "bullets"), "Expected either --questions with --preferences"),
        (("-q", "QUESTIONS", "-p", "bullets", "--thumbs", "t"), "or --thumbs alone"),
        (
            ("-q", "QUESTIONS", "-p", "creative"),
            "no rule 'creative': expected one of one-sentence, few-words,",
        ),
        (("-q", "QUESTIONS", "-p", "bulets"), "or a rule: one-sentence, few-words,"),
        (("-q", "QUESTIONS", "-p", "bulets"), "long (`amulet tune --list-rules` says"),
        (("-q", "QUESTIONS", "-p", "bulets"), "Close to it: bullets"),
        (("-q", "QUESTIONS", "-p", "bullets", "--placement", "top"), "placement='top'"),
        (("-q", "nowhere.json", "-p", "bullets"), "No questions at 'nowhere.json'"),
        (("--thumbs", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    scripted: Amulet,
    loaded: list[object],
    question_file: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    given = [str(question_file) if one == "QUESTIONS" else one for one in arguments]
    result = run("--out", tmp_path / "steering.json", *given)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert message in " ".join(result.stderr.split())
    assert loaded == []
    assert not (tmp_path / "steering.json").exists()


@pytest.mark.parametrize("out", ["nowhere/steering.json", "."])
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    loaded: list[object], question_file: Path, tmp_path: Path, out: str
) -> None:
    result = run("--out", tmp_path / out, "-q", question_file, "-p", "bullets")
    assert result.exit_code == 1
    assert "expected a file in a folder that exists" in " ".join(result.stderr.split())
    assert loaded == []
