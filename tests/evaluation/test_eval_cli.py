"""`amulet eval`: what it writes, prints, passes on and refuses; going on with a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import typer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import amulet.evaluation
from amulet import Amulet
from amulet.errors import EvaluationError
from amulet.evaluation import facts
from amulet.evaluation.cli import register
from amulet.evaluation.judging import SCORERS, JudgeOptions, missing, score_run
from amulet.evaluation.methods import parse_method
from amulet.evaluation.paper import opposite_of, preferences_of
from amulet.evaluation.run import Meta, PreferenceMeta, Run
from tests.models import ScriptedModel

ANSWERS = {"concise": "Tea.", "formal": "Tea, sir.", "": "A leaf."}


@pytest.fixture
def asked(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Make a scripted model the embedded one; returns what it is loaded with."""
    scripted = Amulet(ScriptedModel(tokenizer, ANSWERS), tokenizer)
    loaded: list[object] = []

    def embedded(cls: type[Amulet], **options: object) -> Amulet:
        loaded.append(options)
        return scripted

    monkeypatch.setattr(Amulet, "embedded", classmethod(embedded))
    return loaded


def run(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)  # with a callback, `eval` stays a command of its own
    return CliRunner(env={"COLUMNS": "120", "TERM": "dumb"}).invoke(
        app, ["eval", *map(str, arguments)]
    )


def test_a_run_is_written_and_summed_up(
    asked: list[object], question_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run(
        *("--out", out, "--questions", question_file, "--preferences", "concise,formal"),
        *("--method", "base", "--method", "ours:strength=1", "--limit", 2, "--seed", 3),
        *("--max-new-tokens", 20, "--max-rows", 8, "--dtype", "float32"),
    )
    assert result.exit_code == 0, result.output
    assert asked == [{"device": None, "dtype": "float32", "max_rows": 8}]
    answers = {answer.key: answer.answer for answer in Run(out).answers()}
    assert len(answers) == 2 * 2 * 3
    assert {answers[key] for key in answers if key.endswith("/base")} == {"A leaf."}
    assert {answers[key] for key in answers if "/formal/ours" in key} == {"Tea, sir."}
    meta = Run(out).meta
    assert (meta.model, meta.settings["seed"], meta.sets[0].count) == ("embedded", 3, 2)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[:6] == [
        ["1", "base"],
        ["2", "pref:placement=user"],
        ["3", "ours:strength=1,floor=0.1,placement=user,focus=1,loop_guard=4"],
        ["method", "1", "2", "3"],
        ["answers", "4", "4", "4"],
        ["tokens", "8.0", "7.5", "7.5"],
    ]
    assert lines[6][:3] == ["ms", "per", "token"]


def test_a_narrow_terminal_cuts_no_number(
    asked: list[object], question_file: Path, tmp_path: Path
) -> None:
    strengths = [option for g in range(20) for option in ("--method", f"ours:strength={g}")]
    result = run("--out", tmp_path / "run", "-q", question_file, "-p", "formal", *strengths)
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert ["answers", *["3"] * 21] in [line.split() for line in result.stdout.splitlines()]


def test_facts_are_asked_and_summed_up(
    asked: list[object], question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(judged: Run, amulet: Amulet, tell: Callable[[int, int], None] | None = None) -> None:
        judged.append_facts("Why?", {("pref", "formal"): True, ("pref", "concise"): False})
        judged.append_facts("Who?", {("pref", "formal"): True, ("pref", "concise"): True})

    monkeypatch.setattr(facts, "score_facts", score)
    arguments = ("--out", tmp_path / "run", "-q", question_file, "-p", "formal", "--facts")
    result = run(*arguments, "--method", "base", "--method", "pref")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].split() == ["facts", "right", "–", "0.750"]


def test_a_finished_run_decodes_nothing_more(
    asked: list[object], question_file: Path, tmp_path: Path
) -> None:
    arguments = ("--out", tmp_path / "run", "-q", question_file, "-p", "concise")
    assert run(*arguments, "--method", "pref").exit_code == 0
    before = (tmp_path / "run" / "answers.jsonl").read_bytes()
    assert run(*arguments, "--method", "pref").exit_code == 0
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == before
    other = run(*arguments, "--method", "pref", "--seed", "1")
    assert other.exit_code == 1
    assert "is a run with settings.seed=0, not 1" in other.stderr


def test_the_default_is_the_papers_protocol(
    asked: list[object], question_file: Path, tmp_path: Path
) -> None:
    result = run("--out", tmp_path / "run", "-q", question_file, "--limit", 1, "-n", 4)
    assert result.exit_code == 0, result.output
    meta = Run(tmp_path / "run").meta
    assert [method.name for method in meta.methods] == [
        "base",
        "pref",
        "beam",
        "linear_alignment",
        "amulet",
    ]
    assert len(meta.preferences) == 8
    assert len(Run(tmp_path / "run").answers()) == 5 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--judge", "rulez"),
            "'rulez' is not a judge: expected one of rules, guards, armorm, llm.",
        ),
        (("--judge", "rules"), "'rules' checks preferences that have a rule, and these have none"),
        (("--method", "magic"), "'magic' is not a known method"),
        (("--limit", "0"), "limit=0: expected 1 or more"),
        (("--max-new-tokens", "0"), "max_new_tokens=0"),
        (("--questions", "missing.json"), "No questions at 'missing.json'"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    asked: list[object],
    question_file: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    result = run("--out", tmp_path / "run", "-q", question_file, "-p", "concise", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert asked == []
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Rule:
    name: str
    preference: str
    check: Callable[[str], bool]
    opposite: str | None = None


@pytest.fixture
def two_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module of two rules in the place of the library's own."""
    module = ModuleType("amulet.evaluation.rules")
    rules = {
        "sir": Rule("sir", "Be formal: say sir.", lambda text: "sir" in text, "Never say sir."),
        "short": Rule("short", "Be concise.", lambda text: len(text.split()) == 1),
    }
    module.RULES, module.DEV, module.HELD_OUT = rules, ("sir",), ("short",)  # type: ignore[attr-defined]
    module.rule = rules.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "amulet.evaluation.rules", module)
    monkeypatch.setattr(amulet.evaluation, "rules", module, raising=False)


def test_rules_judge_what_they_check(
    asked: list[object], two_rules: None, question_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ("--out", out, "-q", question_file, "-p", "rules,formal,sir+short", "--limit", 1)
    methods = ("--method", "base", "--method", "ours")
    first = run(*arguments, *methods)
    assert first.exit_code == 0, first.output
    assert Run(out).score_names() == []
    result = run(*arguments, *methods, "--judge", "rules")
    assert result.exit_code == 0, result.output
    found = {key.split("/", 2)[2]: v for key, v in Run(out).scores("rules").items()}
    ours = parse_method("ours").name
    assert found == {
        "sir/base": {"adherence": 0.0},  # "A leaf."
        "short/base": {"adherence": 0.0},
        "sir+short/base": {"adherence": 0.0},
        **{
            f"{wish}/{method}": {"adherence": kept}
            for method in ("pref:placement=user", ours)
            # "Tea, sir." and "Tea."; of both wishes the scripted model hears "concise".
            for wish, kept in (("sir", 1.0), ("short", 1.0), ("sir+short", 0.5))
        },
    }
    assert result.stdout.splitlines()[-1].split() == ["adherence", "0.000", "0.833", "0.833"]
    before = (out / "scores" / "rules.jsonl").read_bytes()
    assert run(*arguments, *methods, "--judge", "rules").exit_code == 0
    assert (out / "scores" / "rules.jsonl").read_bytes() == before  # nothing is judged twice


def test_the_halves_of_the_rules_and_their_opposites(two_rules: None) -> None:
    sir, short = preferences_of(["rules-dev", "rules-heldout"])
    assert sir == PreferenceMeta(name="sir", text="Be formal: say sir.", rule="sir")
    assert short.rule == "short"
    assert opposite_of(sir) == "Never say sir."
    with pytest.raises(EvaluationError, match="'short' has no opposite"):
        opposite_of(short)
    with pytest.raises(EvaluationError, match=r"'shart' is not a preference.*Close to it: short"):
        preferences_of(["shart"])


def test_a_judge_gets_the_run_and_its_options(
    asked: list[object], question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("stand_in")
    seen: list[JudgeOptions] = []

    def score(judged: Run, options: JudgeOptions, tell: Callable[[int, int], None]) -> None:
        seen.append(options)
        for done, answer in enumerate(missing(judged, "guards"), 1):
            judged.append_scores("guards", answer.key, {"words": float(len(answer.answer.split()))})
            tell(done, 1)

    module.score = score  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(SCORERS, "guards", ("stand_in", "score"))
    out = tmp_path / "run"
    arguments = ("--out", out, "-q", question_file, "-p", "formal", "--method", "pref")
    result = run(*arguments, "--limit", 1, "--judge", "guards", "--judge-model", "m")
    assert result.exit_code == 0, result.output
    assert list(Run(out).scores("guards").values()) == [{"words": 2.0}]
    assert seen[0].model == "m"
    assert isinstance(seen[0].amulet, Amulet)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "guards", ("no_such_package_here", "score"))
    empty = Run.create(tmp_path / "run", Meta(model="m", dtype="float32"))
    with pytest.raises(EvaluationError, match=r"no_such_package_here.*amulet-integrations\[eval\]"):
        score_run(empty, "guards")


def test_the_command_is_registered_without_torch() -> None:
    code = (
        "import sys, typer; from amulet.evaluation.cli import register; register(typer.Typer()); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
