"""Starting vLLM's engine with this backend, and asking it and Amulet's own engine the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from amulet import Amulet, Request
from amulet.vllm_backend.cli import PROCESSOR, SCHEDULER
from amulet.vllm_backend.frontend import SETTINGS, Encoder
from amulet.vllm_backend.scheduler import one_step


def start_engine(folder: Path | str, **options: Any) -> LLM:
    """Start vLLM in this process, in float32 and without compilation."""
    return LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        block_size=32,  # the least on a CPU
        seed=0,
        disable_log_stats=True,
        scheduler_cls=SCHEDULER,
        logits_processors=[PROCESSOR],
        **options,
    )


def encoder(engine: LLM) -> Encoder:
    """Return what makes prompts for this engine."""
    config = engine.llm_engine.vllm_config
    return Encoder(
        engine.get_tokenizer(),
        chat_template=None,
        options=None,
        window=config.model_config.max_model_len,
        rows=config.scheduler_config.max_num_seqs,
        step=one_step(config.scheduler_config),
    )


def translate(engine: LLM, request: dict[str, Any]) -> tuple[dict[str, Any], SamplingParams]:
    """Return vLLM's prompt and parameters for the fields of a `Request`, as the server does."""
    settings = {name: request[name] for name in SETTINGS if request.get(name) is not None}
    own, penalty = encoder(engine), request.get("repetition_penalty", 1.0)
    if "messages" in request:
        steered = own.chat(request["messages"], settings, repetition_penalty=penalty)
        plain = engine.get_tokenizer().apply_chat_template(
            request["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        steered = own.text(request["prompt"], settings, penalty)
        plain = engine.get_tokenizer().encode(request["prompt"])
    extra = steered.pair.args() if steered is not None and steered.pair is not None else None
    params = SamplingParams(
        max_tokens=request.get("max_new_tokens", 24),
        temperature=request.get("temperature", 0.0),
        top_p=request.get("top_p", 1.0),
        top_k=request.get("top_k", 0),
        min_p=request.get("min_p", 0.0),
        repetition_penalty=penalty,
        seed=request.get("seed"),
        extra_args=extra,
    )
    return {"prompt_token_ids": plain if steered is None else steered.prompt}, params


def answers(engine: LLM, requests: Sequence[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Return the token ids that vLLM answers, all requests given at once."""
    prompts, params = zip(*(translate(engine, request) for request in requests), strict=True)
    outputs = engine.generate(list(prompts), list(params), use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def expected(amulet: Amulet, requests: Sequence[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Return the token ids that Amulet's own engine answers."""
    replies = amulet.batch([Request(**{"max_new_tokens": 24, **each}) for each in requests])
    return [reply.token_ids for reply in replies]


def scheduler(engine: LLM) -> Any:
    """Return the running scheduler."""
    return engine.llm_engine.engine_core.engine_core.scheduler
