"""gpt-oss on vLLM: the headers of its messages decide, token by token, what is steered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, PreTrainedTokenizerFast

from amulet.output.channels import Channels
from amulet.prepare import last_message
from amulet.vllm_backend.frontend import Encoder, Steered
from tests.models import byte_tokenizer
from tests.vllm.test_processor import ROW, make

TEMPLATE = Path(__file__).parents[1] / "output" / "chat_templates" / "gpt_oss.jinja"
TOKENS = ("start", "channel", "message", "constrain", "end", "call", "return")
USER = [{"role": "user", "content": "Is it raining in Rome?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
THOUGHT = "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{}<|call|>"
ANSWERS = [
    f"{THOUGHT}<|channel|>final<|message|>It rains.<|return|>",
    f"{THOUGHT}{CALL}",
    f"{THOUGHT}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALL}",
    "<|channel|>final<|message|>No <|channel|> in here.<|return|>",
    " to=functions.get_weather<|channel|>commentary<|message|>{}<|call|>",
    "<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
    "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
]


@pytest.fixture(scope="module")
def gpt_oss() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in TOKENS], True)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def steers(tokenizer: PreTrainedTokenizerFast, steered: Steered, answer: str) -> list[bool]:
    """Return after which of an answer's tokens the next one is steered."""
    pair = replace(steered.pair, prompts=[], weights=[3.0], floor=0.0, loop_guard=0)
    row, output, found = replace(ROW, pair=pair), [], []
    processor = make(row, replace(row, number=1), output=output)
    given = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    for token in tokenizer.encode(answer, add_special_tokens=False):
        output.append(token)
        found.append(not torch.equal(processor.apply(given.clone())[0], given[1]))
    return found


def asked(tokenizer: PreTrainedTokenizerFast, messages: Any = USER, **given: Any) -> Steered:
    encoder = Encoder(tokenizer, chat_template=None, options=None, window=4000, rows=8, step=4000)
    steered = encoder.chat(messages, {"preference": "Be brief.", "focus": 0.0}, **given)
    assert steered is not None
    assert steered.pair is not None
    return steered


@pytest.mark.parametrize("tools", [None, [WEATHER]])
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_amulets_own_engine_steers_is_steered(
    gpt_oss: PreTrainedTokenizerFast, answer: str, tools: Any
) -> None:
    steered = asked(gpt_oss, tools=tools)
    base = steered.pair.prompts[-1]
    assert ("get_weather" in gpt_oss.decode(base)) is (tools is not None)
    scanner, expected = Channels(last_message(gpt_oss, base)), []
    for token in gpt_oss.encode(answer, add_special_tokens=False):
        scanner.push(gpt_oss.decode([token]))
        expected.append(scanner.section == "text")
    assert steers(gpt_oss, steered, answer) == expected
    assert any(expected) is ("final" in answer or "I look" in answer)


def test_a_message_of_another_role_is_not_steered(gpt_oss: PreTrainedTokenizerFast) -> None:
    answer = "<|start|>user<|channel|>final<|message|>Thanks"
    assert not any(steers(gpt_oss, asked(gpt_oss), answer))


def test_an_answer_that_goes_on_is_steered_from_its_first_token(
    gpt_oss: PreTrainedTokenizerFast,
) -> None:
    new = asked(gpt_oss)
    assert not any(steers(gpt_oss, new, "It rains."))
    begun = asked(gpt_oss, [*USER, {"role": "assistant", "content": "It "}])
    assert all(steers(gpt_oss, begun, "rains."))


def test_a_tool_without_a_description_and_the_effort(gpt_oss: PreTrainedTokenizerFast) -> None:
    low = asked(gpt_oss, tools=[WEATHER], options={"reasoning_effort": "low"})
    assert "Reasoning: low" in gpt_oss.decode(low.prompt)
