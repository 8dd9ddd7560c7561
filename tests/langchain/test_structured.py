"""Structured output: every schema, every method, streams, raw answers, cut answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from langchain_core.exceptions import OutputParserException
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from amulet import RequestError
from tests.langchain.scripted import scripted_chat


class Person(BaseModel):
    """A person."""

    name: str = Field(description="the name")
    age: int


@dataclasses.dataclass
class Pet:
    """A pet."""

    name: str
    age: int


class Place(TypedDict):
    """A place."""

    name: str
    age: int


SCHEMA = {
    "title": "Thing",
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
JSON = '{"name": "Ann", "age": 7}'
METHODS = ("json_schema", "function_calling", "json_mode")
PLAIN = {"name": "Ann", "age": 7}
# One free text: where the two rows of a scripted model part, they do not meet again.
TITLED = {
    "title": "titled",
    "type": "object",
    "properties": {"title": {"type": "string"}},
    "required": ["title"],
    "additionalProperties": False,
}
STEERED = {"PIRATE": '{"title": "Arr"}', "": '{"title": "Sir"}'}
CASES = [
    (Person, Person(name="Ann", age=7)),
    (Pet, Pet("Ann", 7)),
    (Place, PLAIN),
    (SCHEMA, PLAIN),
]


def says(method: str, schema: Any) -> str:
    if method != "function_calling":
        return JSON
    name = schema["title"] if isinstance(schema, dict) else schema.__name__
    return f'<tool_call>\n{{"name": "{name}", "arguments": {JSON}}}\n</tool_call>'


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("schema", "expected"), CASES)
async def test_every_schema_by_every_method(schema: Any, expected: Any, method: str) -> None:
    chat = scripted_chat(says(method, schema))
    model = chat.with_structured_output(schema, method=method)
    assert model.invoke("x") == expected
    assert await model.ainvoke("x") == expected
    assert model.batch(["x", "x"]) == [expected, expected]
    assert list(model.stream("x"))[-1] == expected
    raw: Any = chat.with_structured_output(schema, method=method, include_raw=True).invoke("x")
    assert raw["parsed"] == expected
    assert raw["parsing_error"] is None
    assert raw["raw"].response_metadata["model_name"] == "llama"


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_gives_partial_objects(method: str) -> None:
    chat = scripted_chat(says(method, SCHEMA))
    states = list(chat.with_structured_output(SCHEMA, method=method).stream("x"))
    assert states[-1] == PLAIN
    assert {"name": "A"} in states
    assert {"name": "Ann"} in states


@pytest.mark.parametrize("method", METHODS)
def test_a_cut_answer_says_so(method: str) -> None:
    chat = scripted_chat(says(method, SCHEMA), max_tokens=50 if method[0] == "f" else 10)
    model = chat.with_structured_output(SCHEMA, method=method)
    message = "max_tokens cut the answer before its end; give more tokens"
    with pytest.raises(OutputParserException, match=message):
        model.invoke("x")
    with pytest.raises(OutputParserException, match=message):
        list(model.stream("x"))
    raw: Any = chat.with_structured_output(SCHEMA, method=method, include_raw=True).invoke("x")
    assert raw["parsed"] is None
    assert message in str(raw["parsing_error"])


def test_the_grammar_holds_a_model_that_would_talk() -> None:
    schema = {
        "title": "mood",
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    chat = scripted_chat("I am in a good mood.")
    for method in ("json_schema", "function_calling"):
        answer = chat.with_structured_output(schema, method=method).invoke("x")
        assert answer["mood"] in ("good", "bad")
    bound = chat.bind(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert str(bound.invoke("x").content).startswith('{"mood": "')


def test_json_is_not_steered_unless_asked() -> None:
    chat = scripted_chat(STEERED, preference="PIRATE")
    for method in ("json_schema", "json_mode"):
        model = chat.with_structured_output(TITLED, method=method)
        assert model.invoke("x") == {"title": "Sir"}
    asked = chat.with_structured_output(TITLED, steer_grammar=True)
    assert asked.invoke("x") == {"title": "Arr"}


def test_options_survive_structured_output_in_any_order() -> None:
    chat = scripted_chat(STEERED)
    steer: dict[str, Any] = {"preference": "PIRATE", "steer_grammar": True}
    routes: list[Any] = [
        chat.bind(**steer).with_structured_output(TITLED),
        chat.with_structured_output(TITLED, **steer),
        chat.with_preference("PIRATE").bind(steer_grammar=True).with_structured_output(TITLED),
        chat.bind(steer_grammar=True).with_preference("PIRATE").with_structured_output(TITLED),
    ]
    for route in routes:
        assert route.invoke("x") == {"title": "Arr"}
        assert route.with_retry().invoke("x") == {"title": "Arr"}
    config: Any = {"configurable": {"preference": "PIRATE"}}
    steered = chat.with_structured_output(TITLED, steer_grammar=True)
    assert steered.invoke("x", config) == {"title": "Arr"}
    assert steered.batch(["x", "x"], [config, {}]) == [{"title": "Arr"}, {"title": "Sir"}]


def test_json_mode_without_a_schema() -> None:
    assert scripted_chat(JSON).with_structured_output(None, method="json_mode").invoke("x") == PLAIN


def test_an_answer_that_does_not_fit_is_reported() -> None:
    class Adult(BaseModel):
        name: str
        age: int

        @field_validator("age")
        @classmethod
        def _of_age(cls, age: int) -> int:  # what no grammar can say
            if age < 18:
                raise ValueError("too young")
            return age

    model = scripted_chat(JSON).with_structured_output(Adult)
    with pytest.raises(OutputParserException, match=r"does not fit the schema(.|\n)*too young"):
        model.invoke("x")


def test_wrong_arguments() -> None:
    chat = scripted_chat(JSON)
    with pytest.raises(RequestError, match="method='magic': expected one of json_schema"):
        chat.with_structured_output(SCHEMA, method="magic")
    with pytest.raises(RequestError, match="expected a schema"):
        chat.with_structured_output()
    with pytest.raises(RequestError, match="response_format=3"):
        chat.invoke("x", response_format=3)


def test_an_agents_response_format_with_tools_first_calls_then_answers() -> None:
    from langchain.agents import create_agent
    from langchain_core.tools import tool

    @tool
    def age(name: str) -> int:
        """The age of a person."""
        return 7

    call = '<tool_call>\n{"name": "age", "arguments": {"name": "Ann"}}\n</tool_call>'
    chat = scripted_chat({"<tool_response>\n7": JSON, "": call}, preference="PIRATE")
    result = create_agent(chat, [age], response_format=Person).invoke({"messages": "How old?"})
    assert [message.type for message in result["messages"]] == ["human", "ai", "tool", "ai"]
    assert result["structured_response"] == Person(name="Ann", age=7)
