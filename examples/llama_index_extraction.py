"""Structured extraction, which a program reads: always valid, and the same with a preference."""

from __future__ import annotations

from typing import Literal

from llama_index.core import PromptTemplate
from pydantic import BaseModel, Field

from amulet_integrations.llama_index import AmuletLLM, preference

NOTE = "Dr. Sara Lindqvist will give a talk about glaciers on Friday in the town library."


class Event(BaseModel):
    """What is announced."""  # the model reads it, as the description of the schema

    speaker: str
    topic: str = Field(max_length=40)
    weekday: Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]


def main() -> None:
    llm = AmuletLLM.embedded(max_tokens=120)
    prompt = PromptTemplate("Read this note and fill in the form.\nNote: {note}")
    plain = llm.structured_predict(Event, prompt, note=NOTE)
    with preference("Talk like a pirate."):
        steered = llm.structured_predict(Event, prompt, note=NOTE)
        prose = llm.complete(f"Announce this: {NOTE}", max_tokens=50)
    print(f"[plain]   {plain!r}\n[pirate]  {steered!r}\n[prose]   {prose}")
    assert plain == steered


if __name__ == "__main__":
    main()
