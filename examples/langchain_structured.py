"""Structured output: always valid against its schema, and not affected by a preference."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from amulet_integrations.langchain import ChatAmulet


class Review(BaseModel):
    """A film review, taken apart."""  # the model reads it, as the description of the schema

    film: str
    verdict: Literal["good", "bad"]
    stars: int = Field(ge=1, le=5)


model = ChatAmulet.embedded(max_tokens=64, preference="Talk like a pirate.")
reader = model.with_structured_output(Review)  # a grammar masks every invalid token

for text in (
    "I saw Jaws last night. What a wonderful film, five stars!",
    "Cats was the worst film I have seen. One star.",
):
    print(repr(reader.invoke(text)))
print(model.invoke("What is your favourite film?").content)  # free text follows the preference
