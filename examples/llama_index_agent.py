"""An agent with tools: the call is plain and always valid, the answer follows the preference."""

from __future__ import annotations

import asyncio

from llama_index.core.agent.workflow import FunctionAgent

from amulet_integrations.llama_index import AmuletLLM, preference


def ferry_times(day: str) -> str:
    """Return when the ferry leaves on a day of the week."""
    return f"On {day} the ferry leaves at 8:15, 12:15 and 17:45."


async def main() -> None:
    # SmolLM2's chat template has no tools: "fallback" describes them in the system message.
    llm = AmuletLLM.embedded(tools_prompt="fallback", max_tokens=80)
    agent = FunctionAgent(
        tools=[ferry_times],
        llm=llm,
        initial_tool_choice="ferry_times",  # the first step must call it: enforced by a grammar
    )
    for wish in ("", "Answer in one short sentence."):
        with preference(wish, strength=1.0, placement="user"):
            answer = await agent.run("When does the ferry leave on Monday?")
        calls = [f"{call.tool_name}({call.tool_kwargs})" for call in answer.tool_calls]
        print(f"[{wish or 'plain'}; {', '.join(calls)}]\n{answer}\n")


if __name__ == "__main__":
    asyncio.run(main())
