"""instructor: an object by a forced call and by a JSON schema, whole and streamed."""

import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Mood(BaseModel):
    """How somebody feels."""

    mood: Literal["good", "bad"]


openai = OpenAI(base_url=sys.argv[1], api_key="none")
messages = [{"role": "user", "content": "Which mood?"}]
wish = {"extra_body": {"preference": "Answer in one short sentence."}}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON):
    client = instructor.from_openai(openai, mode=mode)
    found = client.chat.completions.create(model="m", messages=messages, response_model=Mood)
    assert found.mood == "good", (mode, found)
    found = client.chat.completions.create(
        model="m", messages=messages, response_model=Mood, **wish
    )
    assert found.mood == "good", (mode, found)
client = instructor.from_openai(openai, mode=instructor.Mode.TOOLS)
pieces = client.chat.completions.create_partial(model="m", messages=messages, response_model=Mood)
assert list(pieces)[-1].mood == "good"
messages = [{"role": "user", "content": "What is a black hole?"}]
found = client.chat.completions.create(model="m", messages=messages, response_model=None, **wish)
assert found.choices[0].message.content == "Steered."
