"""Pairs of a model with recurrent state: the next token is that of its two rows, computed apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from amulet.vllm_backend.cli import PROCESSOR, SCHEDULER
from tests.models import VOCAB_SIZE
from tests.vllm.engines import answers, translate
from tests.vllm.folders import save_hybrid

STRENGTH = 2.0
CHAT = [{"role": "user", "content": "What is the sea?"}]
PLAIN: dict[str, Any] = {"messages": CHAT}
STEERED: dict[str, Any] = {
    "messages": CHAT,
    "preference": "Be brief.",
    "strength": STRENGTH,
    "floor": 0.0,
    "focus": 0.0,
    "loop_guard": 0,
    "placement": "system",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(
        model=str(save_hybrid(tmp_path_factory.mktemp("m"))),
        dtype="bfloat16",  # the only one of vLLM's delta net on a CPU
        enforce_eager=True,
        seed=0,
        disable_log_stats=True,
        max_logprobs=VOCAB_SIZE,
        scheduler_cls=SCHEDULER,
        logits_processors=[PROCESSOR],
    )


def after(engine: LLM, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities of a row's next token, `[vocab]`."""
    one = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB_SIZE)
    (output,) = engine.generate([{"prompt_token_ids": ids}], one, use_tqdm=False)
    (found,) = output.outputs[0].logprobs or []
    return torch.tensor([found[token].logprob for token in range(VOCAB_SIZE)])


def test_each_token_is_that_of_the_two_rows(engine: LLM) -> None:
    asked = [STEERED, PLAIN, {**STEERED, "preference": "Talk like a pirate."}]
    found = answers(engine, asked)
    base = translate(engine, PLAIN)[0]["prompt_token_ids"]
    assert len({*found}) == 3
    best = 0
    for request, answer in ((asked[0], found[0]), (asked[2], found[2])):
        preferred = translate(engine, request)[0]["prompt_token_ids"]
        assert len(set(answer)) > 3
        for place, token in enumerate(answer):
            p, r = (after(engine, [*ids, *answer[:place]]) for ids in (preferred, base))
            scores = r + (1 + STRENGTH) * (p - r)
            # Logits of bfloat16 have eight bits; each of the two rows' errs by one of the last.
            error = 2**-7 * max(float(p.abs().max()), float(r.abs().max())) * (1 + 2 * STRENGTH)
            assert float(scores[token]) >= float(scores.max()) - error
            best += int(scores.argmax()) == token
    assert best >= 0.8 * (len(found[0]) + len(found[2]))
