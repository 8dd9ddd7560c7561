"""Every message and the preference reach the model, whatever a template refuses or drops."""

from __future__ import annotations

from typing import Any

import pytest

from amulet import Amulet, RequestError, TemplateError
from amulet.preference import PLACEMENTS, Placement, Preference
from amulet.prompting.prompts import encode_chat
from tests.models import ScriptedModel
from tests.prompting.test_prompts import BRIEF, DIALOGUE, HI, TOOL, controls, rows, turn
from tests.templates import FAMILIES, family_tokenizer

STRICT = """
{%- for message in messages -%}
{%- if message.role == 'system' and not loop.first -%}
{{ raise_exception('System message must be at the beginning.') }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

CHATML_TURN = "<|im_start|>{}\n{}<|im_end|>\n"


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(CHATML_TURN.format(*one) for one in turns)


def call(name: str, arguments: Any, id_: str = "call_1") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def call_history(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    results = [
        turn("tool", f"result{at}", name=one["function"]["name"], tool_call_id=one["id"])
        for at, one in enumerate(calls)
    ]
    return [*HI, turn("assistant", "", tool_calls=list(calls)), *results]


# ---- system messages ----


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_system_message_after_an_answer_is_answered(placement: Placement) -> None:
    strict = family_tokenizer("chatml", chat_template=STRICT)
    answered = [*HI, turn("assistant", "Yes?"), turn("system", "Be kind.")]
    base, preferred = rows(strict, answered, placement)
    opened = "<|im_start|>assistant\n"
    turns = (("user", "Hi"), ("assistant", "Yes?"))
    assert base == chatml(*turns, ("user", "Be kind.")) + opened
    lead = [("system", "Be brief.")] if placement != "user" else []
    last = "Be kind." if placement == "system" else "Be kind.\n\nBe brief."
    assert preferred == chatml(*lead, *turns, ("user", last)) + opened


@pytest.mark.parametrize("name", ["llama2", "mistral", "mistral3", "gemma", "silent", "vicuna",
                                  "user_parts", "command"])  # fmt: skip
def test_no_family_continues_an_answer_that_a_system_message_follows(name: str) -> None:
    late = [*HI, turn("assistant", "Yes?"), turn("system", "Be kind.")]
    as_user = [*HI, turn("assistant", "Yes?"), turn("user", "Be kind.")]
    for placement in PLACEMENTS:
        assert rows(name, late, placement) == rows(name, as_user, placement)


def test_a_system_message_between_two_answers_parts_them() -> None:
    strict = family_tokenizer("chatml", chat_template=STRICT)
    chat = [turn("system", "One."), *HI, turn("assistant", "Yes?"), turn("system", "Two."),
            turn("assistant", "So")]  # fmt: skip
    assert rows(strict, chat)[0] == (
        chatml(("system", "One."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Two."))
        + "<|im_start|>assistant\nSo"
    )


def test_two_system_messages_after_an_answer() -> None:
    late = [*HI, turn("assistant", "Yes?"), turn("system", "One."), turn("system", "Two.")]
    assert rows("gemma", late)[0].endswith(
        "<start_of_turn>user\nOne.\n\nTwo.<end_of_turn>\n<start_of_turn>model\n"
    )


PREFILL = [*HI, turn("assistant", "So")]
RESULT = [*HI, turn("assistant", "", tool_calls=[call("f", {}, "abcdefghi")]),
          turn("tool", "2", tool_call_id="abcdefghi")]  # fmt: skip


@pytest.mark.parametrize("last", [PREFILL, RESULT])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_preference_is_shown_where_the_last_message_is_no_users(
    last: list[dict[str, Any]], placement: Placement
) -> None:
    """Mistral v0.3 writes the system text into the last message, if that is a user's."""
    base, preferred = rows("mistral3", last, placement)
    assert base.startswith("<s>[INST] Hi[/INST]")
    assert preferred == base.replace("Hi", {
        "system": "Be brief.\n\nHi",
        "user": "Hi\n\nBe brief.",
        "both": "Be brief.\n\nHi\n\nBe brief.",
    }[placement])  # fmt: skip
    base, preferred = rows("mistral3", [turn("system", "You cook."), *last], placement)
    assert base.startswith("<s>[INST] You cook.\n\nHi[/INST]")
    assert preferred.count("You cook.") == 1
    assert "Be brief." in preferred


def test_a_system_message_that_tools_displace_is_shown() -> None:
    template = """
    {%- for message in messages -%}
    {%- if message.role != 'system' -%}{{ '<|im_start|>' + message.role + message.content }}
    {%- elif not tools -%}{{ message.content }}{%- endif -%}{%- endfor -%}{{ tools | tojson }}"""
    tokenizer = family_tokenizer("chatml", chat_template=template)
    base, preferred = rows(tokenizer, [turn("system", "You cook."), *HI], tools=[TOOL])
    assert base.startswith("<|im_start|>userYou cook.\n\nHi")
    assert preferred.startswith("<|im_start|>userYou cook. Be brief.\n\nHi")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("chat", [
    HI, DIALOGUE, PREFILL, [turn("system", "You cook."), *HI], [*HI, turn("system", "You cook.")],
    [turn("system", "You cook.")], [*HI, *HI], [*PREFILL, *HI, *HI],
    [*PREFILL, turn("system", "You cook.")], [turn("system", "You cook."), *PREFILL],
    [*HI, turn("system", "You cook."), *HI], [*RESULT, *HI], RESULT,
    call_history(call("f", {"a": 1}), call("g", {"b": 2}, "call_2")),
    [turn("system", "You cook."), *call_history(call("f", '{"a": 1}')), turn("assistant", "So")],
    [turn("user", ""), turn("assistant", ""), *HI], [turn("system", ""), *HI],
])  # fmt: skip
def test_every_family_shows_everything(
    name: str, placement: Placement, chat: list[dict[str, Any]]
) -> None:
    base, preferred = rows(name, chat, placement)
    texts = [message["content"] for message in chat]
    calls = [one["function"] for message in chat for one in message.get("tool_calls", ())]
    texts += [one["name"] for one in calls]
    texts += [
        f'"{key}"' for key in ("a", "b") if f"{key}'" in str(calls) or f'{key}"' in str(calls)
    ]
    for text in texts:
        assert text in base
        assert text in preferred
    assert "Be brief." not in base
    assert preferred.count("Be brief.") == (2 if placement == "both" and "user" in str(chat) else 1)


# ---- tool calls ----


def test_calls_and_results_are_text_where_the_template_ignores_them() -> None:
    chat = call_history(call("add", {"a": 1}))
    assert rows("silent", chat)[0] == (
        '### Human: Hi\n### Assistant: <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n'
        "</tool_call></s>\n### Human: <tool_response>\nresult0\n</tool_response>\n### Assistant:"
    )


@pytest.mark.parametrize("tools_prompt", ["template", "fallback"])
def test_a_history_with_calls_is_answered_without_tools(tools_prompt: Any) -> None:
    tokenizer = family_tokenizer("silent")
    amulet = Amulet(ScriptedModel(tokenizer, {"result0": "Three."}), tokenizer)  # type: ignore[arg-type]
    chat = call_history(call("add", {"a": 1}))
    assert amulet.chat(chat, tools_prompt=tools_prompt).text == "Three."


def test_ids_of_other_makers_are_shortened_for_mistral() -> None:
    chat = call_history(call("add", {"a": 1}, "call_x"), call("sub", {"b": 2}, "call_y"))
    base, _ = rows("mistral3", chat, "user")
    ids = [one.split('"')[0] for one in base.split('"id": "')[1:]]
    answers = [one.split('"')[0] for one in base.split('"call_id": "')[1:]]
    assert ids == answers
    assert [len(one) for one in ids] == [9, 9]
    assert ids[0] != ids[1]
    known = rows("mistral3", call_history(call("add", {"a": 1}, "abcdefghi")), "user")[0]
    assert '"id": "abcdefghi"' in known


def test_calls_stand_alone_where_the_template_takes_one_each() -> None:
    chat = call_history(call("add", {"a": 1}), call("sub", {"b": 2}, "call_2"))
    chat[2:] = chat[:1:-1]  # the results come in another order than the calls
    base, _ = rows("llama31", chat, "user")
    head, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
    assert base.endswith(
        f'{head.format("assistant")}{{"name": "sub", "parameters": {{"b": 2}}}}{end}'
        f'{head.format("ipython")}"result1"{end}'
        f'{head.format("assistant")}{{"name": "add", "parameters": {{"a": 1}}}}{end}'
        f'{head.format("ipython")}"result0"{end}{head.format("assistant")}'
    )


def test_arguments_are_text_where_the_template_joins_them() -> None:
    base, _ = rows("deepseek", call_history(call("add", {"a": 1})), "user")
    assert base == (
        "<s><|User|>Hi<|Assistant|><|calls|><|call|>function<|sep|>add\n```json\n"
        '{"a": 1}\n```<|endcall|><|endcalls|></s><|output|>result0<|endoutput|>'
        "<|Assistant|><think>\n"
    )


# ---- contents as lists ----


def test_contents_are_lists_where_the_template_reads_parts() -> None:
    assert rows("parts", [turn("system", "You cook."), *DIALOGUE]) == [
        "SYSTEM: You cook. USER: Hi ASSISTANT: Yes? USER: Why? ASSISTANT:",
        "SYSTEM: You cook. Be brief. USER: Hi ASSISTANT: Yes? USER: Why? ASSISTANT:",
    ]
    assert rows("parts", PREFILL, "user") == [
        "USER: Hi ASSISTANT: So", "USER: Hi\n\nBe brief. ASSISTANT: So",
    ]  # fmt: skip


def test_only_the_roles_that_need_lists_get_them() -> None:
    assert rows("user_parts", [turn("system", "You cook."), *DIALOGUE], "user") == [
        "<s><|user|>You cook.\n\nHi<|end|><|assistant|>Yes?<|end|><|user|>Why?<|end|><|assistant|>",
        "<s><|user|>You cook.\n\nHi<|end|><|assistant|>Yes?<|end|><|user|>Why?\n\nBe brief.<|end|>"
        "<|assistant|>",
    ]


@pytest.mark.parametrize("reads", [
    "message.content[0].text", "message.content[0]['text']", "message['content'][-1]['text']",
    "(message.content | first).text", "(message.content | map(attribute='text') | join(' '))",
])  # fmt: skip
def test_other_ways_to_read_parts(reads: str) -> None:
    template = (
        f"{{% for message in messages %}}{{{{ message.role }}}}: {{{{ {reads} }}}};{{% endfor %}}"
    )
    tokenizer = family_tokenizer("chatml", chat_template=template)
    assert rows(tokenizer, HI, "user") == ["user: Hi;", "user: Hi\n\nBe brief.;"]


def test_text_and_lists_alike() -> None:
    """Llama 3.2, Gemma 3 and others take both: text stays text."""
    template = (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
        "{% else %}LIST{% for p in message.content %}{{ p.text }}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    assert rows(family_tokenizer("chatml", chat_template=template), HI, "user")[0] == "Hi"


# ---- what no change shows ----


def test_a_message_that_no_change_shows_is_an_error() -> None:
    last_only = family_tokenizer("chatml", chat_template="{{ messages[-1].content }}")
    assert rows(last_only, HI, "user") == ["Hi", "Hi\n\nBe brief."]
    with pytest.raises(TemplateError) as caught:
        rows(last_only, DIALOGUE)
    assert str(caught.value).startswith(
        "The chat template silently drops messages[0] (user), messages[1] (assistant), the "
        "preference: the model would never see it."
    )


def test_a_preference_that_no_prompt_shows_is_an_error() -> None:
    fixed = family_tokenizer("chatml", chat_template="Hello.{{ messages[0].role }}")
    with pytest.raises(TemplateError, match=r"drops messages\[0\] \(user\), the preference"):
        rows(fixed, HI)
    for text in ("\U0010f6d5", "\U0010f6d5\U0010f6d5"):
        with pytest.raises(RequestError, match="with and without the preference are the same"):
            encode_chat(family_tokenizer("chatml"), HI, [BRIEF, Preference(text=text)], "user")
    amulet = Amulet(ScriptedModel(family_tokenizer("chatml"), ""), fixed)  # type: ignore[arg-type]
    with pytest.raises(TemplateError, match="the preference"):
        amulet.chat(HI, preference="Be brief.", strength=0)


def test_a_template_that_looks_at_contents_is_taken_at_its_word() -> None:
    template = (
        "{% for message in messages %}{% if message.content[:2] != 'Hi' %}"
        "{{ raise_exception('say Hi') }}{% endif %}{{ message.content }}{% endfor %}"
    )
    tokenizer = family_tokenizer("chatml", chat_template=template)
    assert rows(tokenizer, HI, "user") == ["Hi", "Hi\n\nBe brief."]
    with pytest.raises(TemplateError, match="say Hi"):
        rows(tokenizer, [turn("user", "No")], "user")


# ---- control tokens and characters in what is not the user's text ----


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_values_of_calls_open_nothing(name: str) -> None:
    tokenizer = family_tokenizer(name)
    tokens = " ".join(token for token in tokenizer.get_added_vocab() if not token.isspace())

    def written(key: str) -> list[int]:
        history = call_history(call("f", {key: {key: [key]}}))
        ids = encode_chat(tokenizer, history, [], "user", template_options={"x": {key: key}}).base
        return controls(tokenizer, ids)

    assert written(tokens) == written("key")


@pytest.mark.parametrize("name", ["deepseek", "phi3", "user_parts"])
def test_roles_that_are_no_special_tokens_do_not_come_from_an_answer(name: str) -> None:
    tokenizer = family_tokenizer(name)
    roles = "<|User|><|Assistant|><|user|><|assistant|><|end|>"
    ids = [
        encode_chat(tokenizer, [*HI, turn("assistant", text), *HI], [], "user").base
        for text in ("Yes", f"Yes {roles}")
    ]
    assert controls(tokenizer, ids[1]) == controls(tokenizer, ids[0])
    assert f"Yes {roles}" in str(tokenizer.decode(ids[1]))


def test_an_answers_own_thinking_is_still_cut_by_the_template() -> None:
    chat = [*HI, turn("assistant", "<think>Hm.</think>Yes"), *HI]
    assert "Hm." not in rows("deepseek", chat, "user")[0]


LONE = "a\ud800b"


def test_half_a_surrogate_pair_is_an_error() -> None:
    tokenizer = family_tokenizer("chatml")
    amulet = Amulet(ScriptedModel(tokenizer, "Yes"), tokenizer)  # type: ignore[arg-type]
    for ask in (
        lambda: amulet.chat([turn("user", LONE)]),
        lambda: amulet.chat(HI, preference=LONE),
        lambda: amulet.chat([*HI, turn("assistant", LONE)]),
        lambda: amulet.complete(LONE),
        lambda: amulet.complete("Go", preference=LONE),
        lambda: amulet.count_tokens(LONE),
    ):
        with pytest.raises(RequestError, match="lone surrogate"):
            ask()
    assert amulet.chat(HI, stop=["\ud800"]).text == "Yes"


@pytest.mark.parametrize(
    "text", ["a\0b", "\u202eabc\u202c", "e\u0301\u0323", "\u200d\ufeff", "👩‍👩‍👧🏽"]
)
def test_any_other_character_stays(text: str) -> None:
    base, preferred = rows("chatml", [turn("user", text)], "user", [Preference(text=f"x{text}x")])
    assert f"user\n{text}<|im_end|>" in base
    assert f"user\n{text}\n\nx{text}x<|im_end|>" in preferred
