"""A reasoning model: thinking is kept apart from the answer, and only the answer is steered."""

from __future__ import annotations

import sys

from amulet_integrations.langchain import ChatAmulet

model = ChatAmulet(
    model=sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen3-0.6B",
    preference="Answer in one short sentence.",
    max_tokens=1024,
)
question = "How many weeks are four fortnights?"

for piece in model.stream(question):
    for block in piece.content_blocks:
        if block["type"] == "reasoning":
            print(f"(thinks) {block['reasoning']}")
        elif block["type"] == "text":
            print(block["text"], end="", flush=True)
print()

# The template's own options go along with a call.
print(model.invoke(question, enable_thinking=False).content)
