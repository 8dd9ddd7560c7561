"""Methods by name, the paper's preferences, and the literal game against the collapsed one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amulet import Amulet, Steering
from amulet.errors import EvaluationError
from amulet.evaluation.decode import evaluate
from amulet.evaluation.jobs import Job, Settings, request_of
from amulet.evaluation.literal import play
from amulet.evaluation.methods import KINDS, parse_method, parse_methods, with_prompt_only
from amulet.evaluation.pairs import combine_of, decode_pairs, divergence, entropy
from amulet.evaluation.paper import NAMES, opposite_of, parts_of, preferences_of
from amulet.evaluation.questions import load_question_sets
from amulet.evaluation.run import PreferenceMeta
from amulet.game import game_gain, steer
from tests.models import random_model
from tests.oracles.literal_game import literal_game


def test_the_papers_methods() -> None:
    found = {kind: parse_method(kind) for kind in KINDS}
    numbers = {kind: (m.strength, m.floor, m.placement, m.adapt) for kind, m in found.items()}
    default = Steering()
    assert numbers == {
        "base": (None, None, None, None),
        "pref": (0.0, None, "system", None),
        "beam": (0.0, None, "system", None),
        "linear_alignment": (2.0, 0.0, "system", None),
        "amulet": (game_gain(), 0.0, "system", None),
        "amulet_literal": (game_gain(), 0.0, "system", None),
        "ours": (default.strength, default.floor, default.placement, None),
    }
    assert found["ours"].steering == default
    assert found["amulet"].steering == Steering.paper()
    assert {(m.focus, m.loop_guard) for kind, m in found.items() if kind != "ours"} == {(0.0, 0)}
    assert [kind for kind, method in found.items() if method.is_steered] == [
        "linear_alignment",
        "amulet",
        "amulet_literal",
        "ours",
    ]


def test_ours_spells_every_number_out() -> None:
    name = "ours:strength=0.5,floor=0.1,placement=user,focus=1,loop_guard=4"
    method = parse_method("ours:strength=.5,focus=1.0,loop_guard=4,floor=.1,placement=user")
    assert method.name == name
    assert parse_method(name) == method
    method = parse_method(" ours:floor=.05, strength=4.0 ,placement=user,adapt=decay")
    assert method.name == "ours:strength=4,floor=0.05,placement=user,adapt=decay"
    assert parse_method(method.name) == method


def test_one_setting_spelled_twice_is_one_method() -> None:
    methods = parse_methods(["pref", "ours:strength=2", "ours:strength=2.0", "pref"])
    assert [method.name for method in methods] == [
        "pref",
        "ours:strength=2,floor=0.1,placement=user,focus=1,loop_guard=4",
    ]


def test_ours_brings_the_prompt_alone_in_its_own_place() -> None:
    given = parse_methods(
        ["base", "ours:placement=user", "pref", "ours:placement=system", "ours:placement=both"]
    )
    ours = (
        "ours:strength={0.strength:g},floor={0.floor:g},placement={0.placement},"
        "focus={0.focus:g},loop_guard={0.loop_guard}"
    ).format
    assert [method.name for method in with_prompt_only(given)] == [
        "base",
        "pref:placement=user",
        ours(given[1]),
        "pref",
        ours(given[3]),
        "pref:placement=both",
        ours(given[4]),
    ]
    prompt_only = parse_method("pref:placement=user")
    assert (prompt_only.strength, prompt_only.placement, prompt_only.is_steered) == (
        *(0.0, "user", False),
    )
    assert with_prompt_only([prompt_only, given[1]]) == [prompt_only, given[1]]
    assert parse_method("pref:placement=system") == parse_method("pref")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pref:strength=1", "'strength' is not a known option: expected one of placement"),
        ("pref:placement=top", "placement='top': input should be 'system', 'user' or 'both'"),
        ("amulett", "'amulett' is not a known method.*Did you mean 'amulet'"),
        ("amulet:strength=1", "amulet takes no options"),
        ("ours:strenght=1", "'strenght' is not a known option.*Did you mean 'strength'"),
        ("ours:strength", "'strength' is not an option; expected name=value"),
        ("ours:strength=1,strength=2", "strength is given twice"),
        ("ours:strength=hard", "strength='hard': input should be a valid number"),
        ("ours:floor=2", "floor='2': input should be less than or equal to 1"),
        ("ours:focus=11", "focus='11': input should be less than or equal to 10"),
        ("ours:loop_guard=-1", "loop_guard='-1': input should be greater than or equal to 0"),
        ("ours:adapt=jsd,focus=1", "adapt=jsd has no focus or loop_guard"),
        ("ours:adapt=decay,loop_guard=4", "adapt=decay has no focus or loop_guard"),
        ("ours:adapt=magic", "adapt='magic': input should be 'jsd'"),
    ],
)
def test_what_is_no_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        parse_method(text)


def test_the_papers_preferences() -> None:
    preferences = preferences_of(["paper", "concise"])
    assert tuple(preference.name for preference in preferences) == NAMES
    assert preferences[0] == PreferenceMeta(
        name="creative", text="Your answer should be creative as much as possible."
    )
    assert opposite_of(preferences[0]) == "Your answer should be as little creative as possible."


def test_preferences_asked_for_at_once() -> None:
    (both,) = preferences_of(["concise+formal"])
    assert both.rule is None
    assert both.name == "concise+formal"
    assert both.text == (
        "Your answer should be concise as much as possible. "
        "Your answer should be formal as much as possible."
    )
    assert opposite_of(both) == (
        "Your answer should be as little concise as possible. "
        "Your answer should be as little formal as possible."
    )
    assert [part.name for part in parts_of(both)] == ["concise", "formal"]


def test_separate_gives_each_part_a_row(tiny: Amulet, question_file: Path) -> None:
    (questions,) = load_question_sets([question_file])
    method = parse_method("ours:strength=2,focus=0,adapt=separate")
    job = Job("small", questions.questions[0], (both(),), method)
    request = request_of(job, Settings())
    assert [preference.text for preference in request.preference] == [
        "Your answer should be concise as much as possible.",
        "Your answer should be formal as much as possible.",
    ]
    with tiny.start(request) as stream:
        assert stream.generation.weights == (1.5, 1.5)


def both() -> PreferenceMeta:
    return preferences_of(["concise+formal"])[0]


def random_rows(rows: int = 3, vocab: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, rows, vocab, generator=generator) * 4
    p, r = logits.log_softmax(dim=-1)
    return p, r


def test_the_literal_game_is_the_oracles() -> None:
    p, r = random_rows()
    expected = literal_game(
        p.double().numpy(), r.double().numpy(), iterations=60, alpha=2.0, lam=2.0, eta=10.0
    )
    np.testing.assert_allclose(play(p.double(), r.double()).numpy(), expected, atol=1e-12)


def test_the_literal_game_amounts_to_its_gain() -> None:
    p, r = random_rows()
    collapsed = steer(p, r, game_gain()).log_softmax(dim=-1)
    literal = play(p, r)
    assert literal.dtype == torch.float32
    torch.testing.assert_close(literal, collapsed, atol=2e-4, rtol=0)
    assert literal.argmax(-1).tolist() == collapsed.argmax(-1).tolist()


def test_divergence_and_entropy_of_known_distributions() -> None:
    even = torch.tensor([[0.5, 0.5]]).log()
    sure = torch.tensor([[1.0 - 1e-7, 1e-7]]).log()
    other = torch.tensor([[1e-7, 1.0 - 1e-7]]).log()
    assert divergence(even, even).item() == pytest.approx(0.0, abs=1e-6)
    assert divergence(sure, other).item() == pytest.approx(1.0, abs=1e-5)
    assert entropy(even).item() == pytest.approx(math.log(2), abs=1e-6)
    assert entropy(sure).item() == pytest.approx(0.0, abs=1e-5)


def test_adaptive_strengths() -> None:
    p, r = random_rows()
    chosen = {
        adapt: combine_of(parse_method(f"ours:strength=3,adapt={adapt}"))
        for adapt in ("jsd", "decay", "entropy", "opposite", "default-system")
    }
    constant = steer(p, r, 3.0)
    torch.testing.assert_close(chosen["jsd"](p, r, 5), steer(p, r, 3.0 * divergence(p, r)))
    torch.testing.assert_close(chosen["decay"](p, r, 0), constant)
    torch.testing.assert_close(chosen["decay"](p, r, 32), steer(p, r, 1.5))
    torch.testing.assert_close(
        chosen["entropy"](p, r, 5), steer(p, r, 3.0 * entropy(p).clamp(max=1.0))
    )
    torch.testing.assert_close(chosen["opposite"](p, r, 5), constant)
    torch.testing.assert_close(chosen["default-system"](p, r, 5), constant)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_pairs_decode_what_the_library_decodes(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Collapsed in the library, literal and collapsed in pairs: three ways, the same tokens."""
    amulet = Amulet(random_model(kind), tokenizer)  # type: ignore[arg-type]
    requests = [
        {
            "messages": [{"role": "user", "content": text}],
            "preference": "Be brief.",
            "strength": game_gain(),
            "floor": 0.0,
            "placement": "system",
            "focus": 0.0,
            "loop_guard": 0,
            "max_new_tokens": 24,
        }
        for text in ("Hi", "What is tea, and who drinks it?")
    ]
    own = amulet.batch(requests)
    prompts = []
    for request in requests:
        with amulet.stream(**request) as stream:
            preferred, base = stream.generation.prompts
        prompts.append((preferred, base))
    literal = decode_pairs(amulet, prompts, parse_method("amulet_literal"), 24)
    collapsed = decode_pairs(amulet, prompts, parse_method("amulet"), 24)
    expected = [list(reply.token_ids) for reply in own]  # type: ignore[union-attr]
    assert [answer.token_ids for answer in literal] == expected
    assert [answer.token_ids for answer in collapsed] == expected


def test_amulet_literal_and_collapsed_on_a_real_model(
    packed_smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    question_file: Path,
    tmp_path: Path,
) -> None:
    """T = 60 run literally gives the collapsed form's answers, token for token, in float32."""
    amulet = Amulet(*packed_smollm, max_rows=12)
    run = evaluate(
        amulet,
        tmp_path / "run",
        sets=load_question_sets([question_file]),
        preferences=preferences_of(["concise"]),
        methods=parse_methods(["amulet", "amulet_literal"]),
        settings=Settings(max_new_tokens=24, trace=True),
        max_rows=12,
    )
    by_method = {
        name: {answer.index: answer for answer in run.answers() if answer.method == name}
        for name in ("amulet", "amulet_literal")
    }
    assert sorted(by_method["amulet"]) == [0, 1, 2]
    for index, collapsed in by_method["amulet"].items():
        literal = by_method["amulet_literal"][index]
        assert literal.token_ids == collapsed.token_ids
        assert literal.answer == collapsed.answer
        assert literal.finish_reason == collapsed.finish_reason
        assert literal.changed == collapsed.changed
        assert literal.steered_tokens is not None
        assert collapsed.steered_tokens is not None
        assert [piece for piece, _ in literal.steered_tokens] == [
            piece for piece, _ in collapsed.steered_tokens
        ]
        for (_, gain), (_, expected) in zip(
            literal.steered_tokens, collapsed.steered_tokens, strict=True
        ):
            assert gain == pytest.approx(expected, abs=2e-3)
