"""A request checks every range once, is frozen, and a finding names field and value."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from amulet.errors import AmuletError, RequestError
from amulet.preference import Preference, Steering
from amulet.reply import Reply, Usage
from amulet.request import Request
from amulet.tool_calls import tool_schemas

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]


def test_the_defaults_are_a_plain_greedy_answer() -> None:
    request = Request(messages=CHAT)
    assert request.messages == (CHAT[0],)
    assert request.preference == ()
    assert (request.strength, request.floor, request.placement) == (None, None, None)
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.0, 0, 1.0, 0.0)
    assert (request.repetition_penalty, request.stop, request.seed) == (1.0, (), None)
    assert (request.max_new_tokens, request.trace, request.top_logprobs) == (256, False, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "Hello"),
        ("messages", 7),
        ("strength", math.nan),
        ("strength", math.inf),
        ("strength", 1001),
        ("strength", "strong"),
        ("floor", -0.1),
        ("floor", 1.1),
        ("floor", math.nan),
        ("placement", "end"),
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", True),
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-30),  # its products are not finite
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("stop", 3),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 1]),
        ("stop", {"a": 1}),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("trace", "perhaps"),
        ("top_logprobs", 101),
        ("logits_processor", 3),
        ("logits_processor", [3]),
        ("tools", 3),
        ("template_options", 3),
        ("preference", 3),
        ("preference", {"text": "a", "weight": 99}),
    ],
)
def test_a_bad_value_is_named_with_its_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as raised:
        Request(**{"messages": CHAT, field: value})
    message = str(raised.value)
    assert message.startswith(f"{field}={value!r}: ")
    assert message.endswith(".")
    assert not message.endswith("..")
    assert isinstance(raised.value, AmuletError)


@pytest.mark.parametrize(
    "given",
    ["Be brief. " * 40, b"PNG", Preference("Be brief. " * 40), [{"text": "Be brief." * 20}]],
)
def test_what_is_long_or_bytes_is_named_by_its_kind(given: Any) -> None:
    """It is a text of somebody, or an image."""
    calls = (
        lambda: Request(messages=CHAT, strength=given),
        lambda: Request(given),
        lambda: Steering(given),
        lambda: tool_schemas([given]),
    )
    for call in calls:
        with pytest.raises(
            RequestError, match=rf"<{type(given).__name__}( of 400 char|>)"
        ) as raised:
            call()
        assert "brief" not in str(raised.value)
        assert len(str(raised.value)) < 400


def test_an_error_tells_a_few_findings() -> None:
    with pytest.raises(RequestError, match=r"messages\.7=5: .*; and 92 more\.") as raised:
        Request(messages=[5] * 100)
    assert "messages.8" not in str(raised.value)


def test_a_message_that_is_no_dict_is_named_by_its_place() -> None:
    with pytest.raises(RequestError, match=r"^messages\.1='Hello': "):
        Request(messages=[CHAT[0], "Hello"])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("max_tokens", "it is called max_new_tokens here"),
        ("max_length", "it is called max_new_tokens here"),
        ("max_completion_tokens", "it is called max_new_tokens here"),
        ("n_predict", "it is called max_new_tokens here"),
        ("num_predict", "it is called max_new_tokens here"),
        ("stop_sequences", "it is called stop here"),
        ("stop_strings", "it is called stop here"),
        ("random_seed", "it is called seed here"),
        ("repeat_penalty", "it is called repetition_penalty here"),
        ("response_format", "it is called grammar here"),
        ("preferences", "it is called preference here"),
        ("preferance", "the closest one is preference"),
        ("whatever", "check its spelling"),
    ],
)
def test_an_unknown_option_is_an_error_that_names_ours(name: str, advice: str) -> None:
    with pytest.raises(RequestError) as raised:
        Request(messages=CHAT, **{name: 5})
    assert str(raised.value) == f"{name}: unknown option; {advice}."


def test_every_bad_field_is_named_at_once() -> None:
    with pytest.raises(RequestError, match=r"^temperature=-1: .*; top_p=0: "):
        Request(messages=CHAT, temperature=-1, top_p=0)


@pytest.mark.parametrize("source", [{}, {"messages": CHAT, "prompt": "Hello"}])
def test_a_chat_or_a_prompt_and_not_both(source: dict[str, Any]) -> None:
    with pytest.raises(
        RequestError, match=r"either messages .a chat. or prompt .raw text., not both"
    ):
        Request(**source)


def test_top_logprobs_needs_the_trace() -> None:
    with pytest.raises(RequestError, match="top_logprobs needs trace=True"):
        Request(messages=CHAT, top_logprobs=3)


@pytest.mark.parametrize(
    ("given_form", "normal"),
    [(None, ()), ([], ()), ("\n", ("\n",)), (["a", "b"], ("a", "b")), (("a",), ("a",))],
)
def test_stop_has_one_normal_form(given_form: Any, normal: tuple[str, ...]) -> None:
    assert Request(prompt="x", stop=given_form).stop == normal


def test_the_preference_has_one_normal_form() -> None:
    request = Request(messages=CHAT, preference=["Be concise.", {"text": "b", "weight": -1}])
    assert request.preference == (Preference("Be concise."), Preference("b", -1.0))
    assert Request(messages=CHAT, preference="").preference == ()


def test_one_processor_or_a_list_of_them() -> None:
    def same(input_ids: Any, scores: Any) -> Any:
        return scores

    assert Request(prompt="x", logits_processor=same).logits_processor == (same,)
    assert Request(prompt="x", logits_processor=[same, same]).logits_processor == (same, same)
    assert Request(prompt="x", logits_processor=None).logits_processor == ()


def test_a_request_is_frozen_and_keeps_its_own_messages() -> None:
    chat = [dict(CHAT[0])]
    request = Request(messages=chat)
    chat[0]["content"] = "something else"
    chat.append({"role": "assistant", "content": "Because."})
    assert request.messages == (CHAT[0],)
    with pytest.raises(ValidationError, match="frozen"):
        request.seed = 3


def test_a_request_survives_json() -> None:
    request = Request(
        messages=CHAT,
        preference=["a", {"text": "b", "weight": -1}],
        strength=3.5,
        floor=0.0,
        placement="user",
        stop=["\n\n", "END"],
        temperature=0.7,
        seed=2**63 - 1,
        trace=True,
        top_logprobs=5,
        template_options={"enable_thinking": False},
    )
    assert Request.model_validate_json(request.model_dump_json()) == request


def test_what_is_not_given_comes_from_the_default_and_zero_is_given() -> None:
    default = Steering(strength=3.0, floor=0.2, placement="user")
    assert Request(messages=CHAT).steering(default) == default
    zeros = Request(messages=CHAT, strength=0.0, floor=0.0, placement="system")
    assert zeros.steering(default) == Steering(strength=0.0, floor=0.0, placement="system")
    assert Request(messages=CHAT, floor=0.0).steering(default).strength == 3.0


def test_a_reply_prints_as_its_text() -> None:
    usage = Usage(prompt_tokens=7, completion_tokens=2, base_prompt_tokens=5)
    reply = Reply(text="Hi.", token_ids=(72, 257), finish_reason="stop", usage=usage)
    assert str(reply) == "Hi."
    assert reply.usage.total_tokens == 9
    assert (reply.steering, reply.stop_string, reply.trace) == (None, None, None)


@pytest.mark.parametrize("kind", [Request, Steering])
def test_options_are_given_by_name(kind: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{kind.__name__}\(0\.5\): expected every option by"):
        kind(0.5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"messages": ["Hi"]}, r"^messages\.0='Hi': expected a dict, such as {\"role\": "),
        ({"messages": [CHAT[0], 5]}, r"^messages\.1=5: expected a dict, such as "),
        ({"grammar": {"type": "object"}}, r"expected a Grammar, such as Grammar\.json_schema\("),
        ({"grammar": "[0-9]+"}, r"^grammar='\[0-9\]\+': expected a Grammar, such as .*regex\("),
    ],
)
def test_a_form_that_is_meant_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Request(**{"messages": CHAT, **options})


def test_a_request_of_a_batch_is_one_or_a_dict_of_its_fields() -> None:
    request = Request(messages=CHAT, seed=1)
    assert Request.of(request) is request
    assert Request.of({"messages": CHAT, "seed": 1}) == request
    for given in (CHAT, CHAT[0], "Hi", None):  # messages, one of them, a text
        with pytest.raises(RequestError, match=r"a request of type \w+: expected a Request, or a"):
            Request.of(given)  # type: ignore[arg-type]
