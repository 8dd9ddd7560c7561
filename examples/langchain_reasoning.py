"""A reasoning model: thinking is separate from the answer, and only the answer is steered."""

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

# A call can pass the template's own options.
print(model.invoke(question, enable_thinking=False).content)
