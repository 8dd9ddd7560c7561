"""Tools, agents and structured prediction: machine-read output is plain and always valid."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import (
    AgentWorkflow,
    CodeActAgent,
    FunctionAgent,
    ReActAgent,
)
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.memory import Memory
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context
from pydantic import BaseModel, Field

from amulet.errors import DecodeError, RequestError, TemplateError
from amulet_integrations.llama_index import (
    AmuletLLM,
    PreferenceMemoryBlock,
    preference,
    preference_of,
    set_preference,
)
from tests.llama_index.doubles import PLAIN, STEERED, WISH, calling, scripted
from tests.models import byte_tokenizer


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def weather(city: str) -> str:
    """Tell the weather."""
    return f"Sun in {city}."


TOOLS = [FunctionTool.from_defaults(add), FunctionTool.from_defaults(weather)]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
TWO = CALL + '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def selected(llm: AmuletLLM, response: Any) -> list[tuple[str, dict[str, Any]]]:
    calls = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    return [(call.tool_name, call.tool_kwargs) for call in calls]


async def test_chat_with_tools() -> None:
    llm = calling({"": CALL}, preference=WISH)
    one = [("add", {"a": 2, "b": 3})]
    response = llm.chat_with_tools(TOOLS, user_msg="2 + 3?")
    assert selected(llm, response) == one
    assert response.raw["finish_reason"] == "tool_calls"
    assert response.message.content is None
    assert selected(llm, await llm.achat_with_tools(TOOLS, user_msg="2 + 3?")) == one
    pieces = list(llm.stream_chat_with_tools(TOOLS, user_msg="2 + 3?"))
    assert selected(llm, pieces[-1]) == one
    pieces = [p async for p in await llm.astream_chat_with_tools(TOOLS, user_msg="2 + 3?")]
    assert selected(llm, pieces[-1]) == one
    assert [tool["function"]["name"] for tool in llm.amulet.last.tools] == ["add", "weather"]
    assert llm.amulet.last.tool_choice == "auto"


def test_parallel_calls_only_where_allowed() -> None:
    llm = calling({"": TWO})
    both = llm.chat_with_tools(TOOLS, user_msg="?", allow_parallel_tool_calls=True)
    assert selected(llm, both) == [("add", {"a": 2, "b": 3}), ("weather", {"city": "Rome"})]
    first = llm.chat_with_tools(TOOLS, user_msg="?")
    assert selected(llm, first) == [("add", {"a": 2, "b": 3})]
    assert len(first.message.additional_kwargs["tool_calls"]) == 1


def test_a_required_tool_is_enforced_by_grammar() -> None:
    llm = calling({"": 'Rome"}'})  # would rather say this than call
    assert selected(llm, llm.chat_with_tools(TOOLS, user_msg="?")) == []
    response = llm.chat_with_tools(TOOLS, user_msg="?", tool_required=True, max_tokens=200)
    assert len(selected(llm, response)) == 1
    assert llm.amulet.last.tool_choice == "any"
    for same in ("any", "required", True, {"type": "any"}):
        llm.chat_with_tools(TOOLS, user_msg="?", tool_choice=same, max_tokens=1)
        assert llm.amulet.last.tool_choice == "any"
    for choice in ("weather", {"type": "function", "function": {"name": "weather"}}):
        response = llm.chat_with_tools(TOOLS, user_msg="?", tool_choice=choice, max_tokens=200)
        assert selected(llm, response) == [("weather", {"city": "Rome"})]


def test_no_call_is_an_error_that_says_what_was_said() -> None:
    llm = calling({"": "Five."})
    with pytest.raises(RequestError, match=r"called no tool; it said 'Five\.'"):
        llm.get_tool_calls_from_response(llm.chat_with_tools(TOOLS, user_msg="?"))


def test_a_call_that_is_cut_off_is_an_error_that_says_so() -> None:
    llm = calling({"": CALL}, max_tokens=30)
    response = llm.chat_with_tools(TOOLS, user_msg="?", tool_required=True)
    assert selected(llm, response) == []
    with pytest.raises(DecodeError, match=r"cut off \(finish reason 'length'\)"):
        llm.get_tool_calls_from_response(response)


async def test_a_cut_or_unreadable_call_is_never_one() -> None:
    """Streamed or not: the last response is that of `chat_with_tools`, and no other has a call."""
    broken = CALL.replace('"b": 3', '"b"')
    cases: list[tuple[str, dict[str, Any]]] = [(broken, {}), (CALL.replace("3", "NaN"), {})]
    cases += [(CALL, {"max_tokens": tokens}) for tokens in (1, 20, 40, 46, 47)]
    for answer, options in cases:
        llm = calling({"": answer}, **options)
        whole = llm.chat_with_tools(TOOLS, user_msg="?")
        assert selected(llm, whole) == []
        assert len(whole.raw["invalid_tool_calls"]) == 1
        pieces = list(llm.stream_chat_with_tools(TOOLS, user_msg="?"))
        stream = await llm.astream_chat_with_tools(TOOLS, user_msg="?")
        for responses in (pieces, [piece async for piece in stream]):
            assert [selected(llm, response) for response in responses] == [[]] * len(responses)
            assert responses[-1].message == whole.message
            (found,) = responses[-1].raw["invalid_tool_calls"]
            (expected,) = whole.raw["invalid_tool_calls"]
            assert {**found, "id": ""} == {**expected, "id": ""}
    both = calling({"": "\n".join([CALL, CALL, TWO])})
    made = both.chat_with_tools(TOOLS, user_msg="?", allow_parallel_tool_calls=True)
    assert [name for name, _ in selected(both, made)] == ["add", "add", "weather"]


def test_predict_and_call() -> None:
    llm = calling({"": CALL})
    assert str(llm.predict_and_call(TOOLS, user_msg="2 + 3?")) == "5"


def test_a_template_without_tools_is_an_error_unless_there_is_the_fallback() -> None:
    with pytest.raises(TemplateError, match="fallback"):
        scripted({"": CALL}).chat_with_tools(TOOLS, user_msg="?")
    llm = scripted({"": CALL}, tools_prompt="fallback")
    assert selected(llm, llm.chat_with_tools(TOOLS, user_msg="?")) == [("add", {"a": 2, "b": 3})]


# ---- agents ----


@pytest.mark.parametrize("streaming", [True, False])
async def test_function_agent(streaming: bool) -> None:
    llm = calling({"<tool_response>\n5": PLAIN, "": CALL})
    agent = FunctionAgent(tools=TOOLS, llm=llm, streaming=streaming)
    result = await agent.run("2 + 3?")
    assert str(result) == PLAIN
    assert [(call.tool_name, call.tool_output.content) for call in result.tool_calls] == [
        ("add", "5")
    ]
    with preference(WISH):
        await agent.run("2 + 3?")
    assert llm.amulet.steered == [False, False, True, True]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("tokens", [1, 30, 47])
async def test_an_agent_makes_no_cut_call(streaming: bool, tokens: int) -> None:
    llm = calling({"": CALL}, max_tokens=tokens)
    agent = FunctionAgent(tools=TOOLS, llm=llm, streaming=streaming)
    assert (await agent.run("2 + 3?")).tool_calls == []
    handler = AgentWorkflow(agents=[agent]).run("2 + 3?")
    async for event in handler.stream_events():
        assert not getattr(event, "tool_calls", None)
    assert (await handler).tool_calls == []


async def test_agents_take_the_preference_of_their_context_and_memory() -> None:
    llm = calling({WISH: STEERED, "": PLAIN})
    agent = FunctionAgent(tools=TOOLS, llm=llm)
    context = Context(agent)
    await set_preference(context, WISH)
    with await preference_of(context):
        assert str(await agent.run("Hi", ctx=context)) == STEERED
    assert str(await agent.run("Hi")) == PLAIN
    block = PreferenceMemoryBlock()
    block.set("anna", WISH)
    memory = Memory.from_defaults(session_id="anna", memory_blocks=[block])
    assert str(await agent.run("Hi", memory=memory)) == STEERED


THOUGHT = 'Thought: I need a tool.\nAction: add\nAction Input: {"a": 2, "b": 3}'
FINAL = "Thought: I can answer.\nAnswer: The sum of two and three is five."


@pytest.mark.parametrize("streaming", [True, False])
async def test_react_agent_steers_only_after_answer(streaming: bool) -> None:
    # The steered continuation is picked by the preference in the prompt and the "Answer:" before.
    said = {WISH: " Five.", "Observation: 5": FINAL, "": THOUGHT}
    llm = scripted(said)
    agent = ReActAgent(tools=TOOLS, llm=llm, streaming=streaming)
    plain = await agent.run("2 + 3?")
    assert str(plain) == "The sum of two and three is five."
    assert llm.amulet.steered == [False, False]
    with preference(WISH):
        steered = await agent.run("2 + 3?")
    assert str(steered) == "Five."
    assert [call.tool_output.content for call in steered.tool_calls] == ["5"]
    # thought and action; thought; answer
    assert llm.amulet.steered[2:] == [False, False, True]
    assert llm.amulet.last.messages[-1] == {
        "role": "assistant",
        "content": "Thought: I can answer.\nAnswer:",
    }


async def test_react_agent_takes_the_preference_of_its_memory() -> None:
    llm = scripted({WISH: " Five.", "": FINAL})
    block = PreferenceMemoryBlock()
    block.set("anna", WISH)
    memory = Memory.from_defaults(session_id="anna", memory_blocks=[block])
    agent = ReActAgent(tools=TOOLS, llm=llm)
    assert str(await agent.run("2 + 3?", memory=memory)) == "Five."


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_action_with_answer_in_its_input_is_plain(streaming: bool) -> None:
    """LlamaIndex's parser takes the action: what follows "Answer:" is the tool's."""
    action = 'Thought: Noted.\nAction: weather\nAction Input: {"city": "Answer: Rome"}'
    llm = scripted({"Observation: Sun": FINAL, WISH: ' Oslo"}', "": action}, preference=WISH)
    result = await ReActAgent(tools=TOOLS, llm=llm, streaming=streaming).run("Where?")
    assert [call.tool_kwargs for call in result.tool_calls] == [{"city": "Answer: Rome"}]
    assert llm.amulet.steered == [False, False, False, True]


def without_template() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return {"tokenizer": tokenizer}


@pytest.mark.parametrize(
    "options", [{"messages_to_prompt": lambda said: f"<{said[-1].content}> "}, without_template()]
)
async def test_react_agent_of_a_raw_prompt_goes_on_from_its_thoughts(options: Any) -> None:
    llm = scripted({WISH: " Five.", "": FINAL}, preference=WISH, **options)
    assert str(await ReActAgent(tools=TOOLS, llm=llm).run("2 + 3?")) == "Five."
    thoughts, answer = llm.amulet.requests
    assert answer.prompt == thoughts.prompt + "Thought: I can answer.\nAnswer:"
    assert answer.messages is None


async def test_react_agent_answers_with_its_thinking_before_it() -> None:
    llm = calling({WISH: " Five.", "": f"<think>\nHm.\n</think>\n\n{FINAL}"}, preference=WISH)
    assert str(await ReActAgent(tools=TOOLS, llm=llm).run("2 + 3?")) == "Five."
    assert llm.amulet.last.messages[-1] == {
        "role": "assistant",
        "content": "Thought: I can answer.\nAnswer:",
        "reasoning_content": "Hm.",
    }


@pytest.mark.parametrize("streaming", [True, False])
async def test_code_of_a_code_act_agent_is_plain(streaming: bool) -> None:
    def run(code: str) -> str:
        return f"Ran {code}"

    code = "<execute>\nprint(2 + 3)\n</execute>"
    said = {"Ran print": PLAIN, WISH: "Sum: <execute>\nprint(6)\n</execute>", "": code}
    for wish, prose in (("", ""), (WISH, "Sum: ")):
        llm = scripted(said, preference=wish)
        agent = CodeActAgent(code_execute_fn=run, llm=llm, streaming=streaming)
        result = await agent.run("2 + 3?")
        assert [call.tool_kwargs for call in result.tool_calls] == [{"code": "print(2 + 3)"}]
        assert str(result) == PLAIN
        assert llm.amulet.steered == ([True, False, True] if wish else [False, False])
        assert llm.amulet.requests[-1].messages[2]["content"].startswith(f"{prose}<execute>")


REACHED = "You have reached the maximum number of iterations"


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", [FunctionAgent, ReActAgent])
async def test_the_last_word_of_an_agent_that_is_stopped_is_steered(
    kind: Any, streaming: bool
) -> None:
    llm = calling({WISH: STEERED, REACHED: PLAIN, "": THOUGHT}, preference=WISH)
    agent = kind(name="adder", tools=TOOLS, llm=llm, streaming=streaming)
    agent.early_stopping_method = "generate"
    workflow = AgentWorkflow(agents=[agent], early_stopping_method="generate")
    for asked in (agent, workflow):
        assert str(await asked.run("2 + 3?", max_iterations=1)) == STEERED
        assert REACHED in llm.amulet.last.messages[-1]["content"]
        assert llm.amulet.last.stop == ()


async def test_agent_workflow_hands_off() -> None:
    hand = (
        '<tool_call>\n{"name": "handoff", "arguments": {"to_agent": "adder", '
        '"reason": "sums"}}\n</tool_call>'
    )
    llm = calling({"You add.": CALL, "You greet.": hand})
    done = calling({WISH: STEERED, "<tool_response>\n5": PLAIN, "": CALL})
    greeter = FunctionAgent(
        name="greeter", description="greets", system_prompt="You greet.", llm=llm,
        can_handoff_to=["adder"],
    )  # fmt: skip
    adder = FunctionAgent(
        name="adder", description="adds", system_prompt="You add.", llm=done, tools=TOOLS
    )
    workflow = AgentWorkflow(agents=[greeter, adder], root_agent="greeter")
    result = await workflow.run("2 + 3?")
    assert (str(result), result.current_agent_name) == (PLAIN, "adder")


# ---- structured prediction ----


class Person(BaseModel):
    """A person."""

    name: str
    age: int = Field(ge=0, le=200)


ASK = PromptTemplate("Who is {who}?")
ANNA = '{"name": "Anna", "age": 30}'


async def test_structured_predict() -> None:
    llm = scripted({"": ANNA}, preference=WISH)
    anna = Person(name="Anna", age=30)
    assert llm.structured_predict(Person, ASK, who="she") == anna
    assert await llm.astructured_predict(Person, ASK, who="she") == anna
    partial = [p.model_dump() for p in llm.stream_structured_predict(Person, ASK, who="she")]
    assert partial[0] == {"name": None, "age": None}
    assert {"name": "An", "age": None} in partial
    assert partial[-1] == anna.model_dump()
    stream = await llm.astream_structured_predict(Person, ASK, who="she")
    assert [p async for p in stream][-1] == anna
    assert llm.as_structured_llm(Person).complete("Who?").raw == anna
    with preference(WISH):
        assert llm.as_structured_llm(Person).chat([ChatMessage("Who?")]).raw == anna
    assert not any(llm.amulet.steered)
    schema = json.dumps(Person.model_json_schema())
    assert llm.amulet.requests[0].messages == (
        {"role": "user", "content": f"Who is she?\n\nAnswer in JSON of this schema:\n{schema}"},
    )


def test_the_grammar_makes_any_model_valid() -> None:
    llm = scripted({"": 'Anna"'}, max_tokens=300)  # no brace, no key, no number
    assert llm.structured_predict(Person, ASK, who="she") == Person(name="Anna", age=0)


def test_json_that_is_cut_off_is_an_error() -> None:
    llm = scripted({"": ANNA}, max_tokens=9)
    with pytest.raises(DecodeError, match=r"Person was cut off after 9 tokens"):
        llm.structured_predict(Person, ASK, who="she")


def test_function_calling_program() -> None:
    call = f'<tool_call>\n{{"name": "Person", "arguments": {ANNA}}}\n</tool_call>'
    llm = calling({"": call}, preference=WISH)
    program = FunctionCallingProgram.from_defaults(Person, prompt=ASK, llm=llm)
    assert program(who="she") == Person(name="Anna", age=30)
    assert list(program.stream_call(who="she"))[-1] == Person(name="Anna", age=30)
    assert [request.tool_choice for request in llm.amulet.requests] == ["any", "any"]
    assert not any(llm.amulet.steered)


def test_calls_come_as_blocks() -> None:
    llm = calling({"": CALL})
    (block,) = llm.chat_with_tools(TOOLS, user_msg="?").message.blocks
    assert isinstance(block, ToolCallBlock)
    assert (block.tool_name, block.tool_kwargs) == ("add", {"a": 2, "b": 3})
    assert block.tool_call_id
