"""LangSmith traces of steered answers: settings are metadata, the preference's text is not sent.

With LANGSMITH_API_KEY set, the traces go to LangSmith; without it, their metadata is printed.
"""

from __future__ import annotations

import json
import os
from typing import Any

import requests
from langchain_core.prompts import ChatPromptTemplate
from langsmith import Client, tracing_context

from amulet_integrations.langchain import ChatAmulet

PEOPLE = {"anna": "Answer in one short sentence.", "ben": "Answer as a numbered list."}


class Printer(requests.Session):
    """Stands in for LangSmith's server: prints what it would be sent of a model's call."""

    def request(self, method: Any, url: Any, *_: Any, **options: Any) -> requests.Response:
        run = json.loads(options["data"])
        if method == "POST" and run["run_type"] == "llm":
            metadata = run["extra"]["metadata"]
            for name in sorted(metadata):
                if name.startswith(("amulet_", "ls_model_name", "user")):
                    print(f"  {name}: {metadata[name]}")
        response = requests.Response()
        response.status_code = 202
        return response


def client() -> Client:
    """Return LangSmith's client, or one that prints."""
    if os.environ.get("LANGSMITH_API_KEY"):
        return Client()
    where = "http://langsmith.invalid"
    return Client(where, api_key="-", session=Printer(), auto_batch_tracing=False, info={})


prompt = ChatPromptTemplate.from_messages([("human", "How do I keep a {plant} alive?")])
chain = prompt | ChatAmulet.embedded(max_tokens=32)
with tracing_context(enabled=True, client=client()):
    for user, preference in PEOPLE.items():
        # In a list: LangChain copies every text in `configurable` into LangSmith's metadata.
        config = {"configurable": {"preference": [preference]}, "metadata": {"user": user}}
        print(f"{user}: {chain.invoke({'plant': 'houseplant'}, config).text}")
