"""`Amulet.compare` and `Amulet.strength_curve`: what is decoded, what is shown, what is refused."""

from __future__ import annotations

import builtins
import io
from typing import Any

import pytest
from rich.console import Console

from amulet import Amulet, Preference, RequestError
from amulet.errors import MissingPackageError
from tests.models import ScriptedModel, byte_tokenizer, random_model
from tests.rendering.test_html import Page

QUESTION = "What is tea?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SHORT = {"max_new_tokens": 10}


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    return Amulet(random_model("qwen2"), byte_tokenizer())


@pytest.fixture
def scripted() -> Amulet:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, {"Be <brief>.": "A <leaf>.", "": "Tea is a drink."})
    return Amulet(model, tokenizer)


def printed(given: object) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(given)
    return out.getvalue()


def test_the_three_answers_are_those_of_chat(amulet: Amulet) -> None:
    options: dict[str, Any] = {"floor": 0.0, "placement": "user", **SHORT}
    found = amulet.compare(QUESTION, "Be brief.", strength=1.5, **options)
    assert found.plain.token_ids == amulet.chat(MESSAGES, **SHORT).token_ids
    for reply, strength in ((found.prompted, 0.0), (found.steered, 1.5)):
        alone = amulet.chat(MESSAGES, preference="Be brief.", strength=strength, **options)
        assert reply.token_ids == alone.token_ids
        assert reply.steering == alone.steering
    assert found.plain.token_ids != found.steered.token_ids


def test_messages_and_several_preferences_can_be_compared(amulet: Amulet) -> None:
    wishes = [Preference("Be brief."), Preference("Be rude.", weight=-0.5)]
    found = amulet.compare(MESSAGES, wishes, **SHORT)
    expected = amulet.chat(MESSAGES, preference=wishes, **SHORT)
    assert found.steered.token_ids == expected.token_ids


def test_all_are_decoded_together() -> None:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, "Tea.")
    Amulet(model, tokenizer, drafts=False).compare(QUESTION, "Be brief.")
    assert max(rows for rows, _ in model.calls) == 6  # plain, two rows, and a third for focus


def test_a_comparison_is_three_titled_columns(scripted: Amulet) -> None:
    found = scripted.compare(QUESTION, "Be <brief>.", strength=2)
    page = Page(found._repr_html_())
    titles = [attributes["aria-label"] for tag, attributes in page.elements if tag == "section"]
    assert titles == ["plain", "prompt only (strength 0)", "steered (strength 2)"]
    assert page.text.count("Tea is a drink.") == 1
    assert page.text.count("A <leaf>.") == 2
    assert any("underline" in str(token.get("style")) for token in page.tokens())
    shown = printed(found)
    assert all(title in shown for title in titles)
    assert shown.count("A <leaf>.") == 2
    assert str(found) == (
        "plain:\nTea is a drink.\n\nprompt only (strength 0):\nA <leaf>.\n\n"
        "steered (strength 2):\nA <leaf>."
    )


@pytest.mark.parametrize("nothing", [None, "", [], "  "])
def test_without_a_preference_there_is_nothing_to_compare(amulet: Amulet, nothing: Any) -> None:
    with pytest.raises(RequestError, match="expected one that can be compared"):
        amulet.compare(QUESTION, nothing)
    with pytest.raises(RequestError, match="expected one that can be compared"):
        amulet.strength_curve(QUESTION, nothing)


def test_what_is_no_question_is_told_what_one_is(amulet: Amulet) -> None:
    calls: tuple[Any, ...] = (amulet.compare, amulet.strength_curve)
    for call in calls:
        with pytest.raises(RequestError, match=r"^messages=5: expected a list of messages, such"):
            call(5, "Be brief.")


def test_a_misspelt_option_is_refused(amulet: Amulet) -> None:
    with pytest.raises(RequestError, match="max_tokens: unknown option"):
        amulet.compare(QUESTION, "Be brief.", max_tokens=10)


def test_a_curve_is_the_answers_of_chat_weakest_first(amulet: Amulet) -> None:
    curve = amulet.strength_curve(QUESTION, "Be brief.", strengths=(2, 0, 1), **SHORT)
    assert [point.strength for point in curve.points] == [0, 1, 2]
    assert curve.plain.strength is None
    assert curve.plain.reply.token_ids == amulet.chat(MESSAGES, **SHORT).token_ids
    for point in curve.points:
        alone = amulet.chat(MESSAGES, preference="Be brief.", strength=point.strength, **SHORT)
        assert point.reply.token_ids == alone.token_ids


def test_the_figures_of_a_point(scripted: Amulet) -> None:
    curve = scripted.strength_curve(QUESTION, "Be <brief>.", strengths=(1,))
    plain, (point,) = curve.plain, curve.points
    assert (plain.words, point.words) == (4, 2)
    assert plain.changed == 0.0
    assert plain.log_probability == pytest.approx(0.0, abs=1e-5)  # the model is sure of it
    assert point.changed == 1.0  # the plain row would begin its own answer at every token
    assert point.log_probability == pytest.approx(-20.0, abs=1e-3)


def test_the_figure_plots_the_points(amulet: Amulet) -> None:
    curve = amulet.strength_curve(QUESTION, "Be brief.", strengths=(0, 1, 2), **SHORT)
    panels = curve.figure().axes
    drawn = [panel.lines[0].get_ydata() for panel in panels]
    for values, name in zip(drawn, ("words", "log_probability", "changed"), strict=True):
        assert list(values) == [getattr(point, name) for point in curve.points]
        assert all(list(panel.lines[0].get_xdata()) == [0, 1, 2] for panel in panels)


def test_a_curve_in_a_notebook_is_plot_and_table(scripted: Amulet) -> None:
    html = scripted.strength_curve(QUESTION, "Be <brief>.", strengths=(0, 1))._repr_html_()
    assert html.count("<svg ") == html.count('role="img" aria-label="Words, ') == 1
    assert html.count("<td") == 3 * 5
    assert html.count("A &lt;leaf&gt;.") == 2
    assert "<leaf>" not in html


def test_a_curve_in_a_terminal_is_a_table(scripted: Amulet) -> None:
    shown = printed(scripted.strength_curve(QUESTION, "Be <brief>.", strengths=(0, 1)))
    assert shown.count("A <leaf>.") == 2
    assert "log p (plain model)" in shown


def test_without_matplotlib_the_table_stays(
    scripted: Amulet, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return imported(name, *arguments)

    curve = scripted.strength_curve(QUESTION, "Be <brief>.", strengths=(0, 1))
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingPackageError, match="pip install"):
        curve.figure()
    assert "pip install" in curve._repr_html_()
    assert curve._repr_html_().count("<td") == 3 * 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strengths": ()}, r"strengths=\(\): expected at least one"),
        ({"strengths": 2}, r"strengths=2: expected at least one, such as \(0, 1, 2\)"),
        ({"strength": 2}, r"give strengths=\(0, 1, 2\)"),
        ({"strengths": (0, 9999)}, "strength=9999"),
        ({"strengths": (0, "much")}, "strength='much'"),
    ],
)
def test_strengths_are_checked(amulet: Amulet, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        amulet.strength_curve(QUESTION, "Be brief.", **options)
