"""Compares eight steered users together with eight plain calls in turn, also in frameworks.

Claims: tokens per second of eight steered users in one batch are at least 5 times those of eight
plain `generate` calls in turn (bfloat16); through `ChatAmulet.batch` at least 4 times those of a
plain `ChatHuggingFace.batch` over a pipeline. LlamaIndex's `HuggingFaceLLM` is compared on one
prompt. A framework or peer that is not installed is skipped with a message.

    python -m benchmarks.users [--dtype bfloat16] [--rounds 3] [--tokens 32]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import contenders, measure
from benchmarks.measure import Claim, Spread, at_least, name_of
from benchmarks.passages import Chat, rag_chat

USERS = (
    ("Answer in one short sentence.", "Which of these places is the oldest?"),
    ("Talk like a pirate.", "What would a child enjoy here?"),
    ("Use a numbered list.", "How do I get from one place to the next?"),
    ("Explain as to a five-year-old.", "What happened in the fires?"),
    ("Be formal and polite.", "Who built these places?"),
    ("Give an example for each point.", "What do the bells weigh?"),
    ("Be enthusiastic.", "Where should I go on a Sunday?"),
    ("Be sceptical and name what is not known.", "What does a visit cost?"),
)
TOGETHER, IN_TURN = "amulet, eight steered together", "transformers, eight plain in turn"
CHAT_AMULET, CHAT_PEER = "ChatAmulet.batch, steered", "ChatHuggingFace.batch, plain"
LLAMA_AMULET, LLAMA_PEER = "LlamaIndex AmuletLLM, steered", "HuggingFaceLLM, plain"

Runs = dict[str, Callable[[int], object]]


def chats(length: int) -> list[Chat]:
    """Return eight chats with their own passages, the shortest a third of the longest."""
    lengths = [length * (8 + 2 * i) // 22 for i in range(8)]
    return [
        rag_chat(contenders.tokenizer(), lengths[i], question, seed=i)
        for i, (_, question) in enumerate(USERS)
    ]


def direct(theirs: Any, amulet: Any, talks: list[Chat]) -> Runs:
    """Return the two contenders without a framework."""
    prompts = [amulet.encode_chat(chat) for chat in talks]
    print(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")

    def together(n: int) -> None:
        requests = [
            {"messages": chat, "preference": preference, "max_new_tokens": n}
            for chat, (preference, _) in zip(talks, USERS, strict=True)
        ]
        counts = {len(reply.token_ids) for reply in amulet.batch(requests)}
        assert counts == {n}, counts

    def in_turn(n: int) -> None:
        for prompt in prompts:
            contenders.generate(theirs, prompt, n)

    return {IN_TURN: in_turn, TOGETHER: together}


def langchain(theirs: Any, amulet: Any, talks: list[Chat]) -> Runs:
    """Return LangChain's two chat models over the same prompts."""
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
    from transformers import pipeline

    from amulet_integrations.langchain import ChatAmulet

    inputs: list[Any] = [[(m["role"], m["content"]) for m in chat] for chat in talks]
    configs: list[Any] = [{"configurable": {"preference": preference}} for preference, _ in USERS]

    @functools.cache  # the length of its answers is fixed at creation
    def peer_of(n: int) -> Any:
        make: Any = pipeline
        inner = make(
            "text-generation",
            model=theirs,
            tokenizer=contenders.tokenizer(),
            max_new_tokens=n,
            do_sample=False,
            return_full_text=False,
        )
        return ChatHuggingFace(
            llm=HuggingFacePipeline(pipeline=inner), tokenizer=contenders.tokenizer()
        )

    def ours(n: int) -> None:
        replies = ChatAmulet(amulet=amulet, max_new_tokens=n).batch(inputs, configs)
        counts = {r.usage_metadata["output_tokens"] for r in replies if r.usage_metadata}
        assert counts == {n}, counts

    return {CHAT_PEER: lambda n: peer_of(n).batch(inputs), CHAT_AMULET: ours}


def llama_index(theirs: Any, amulet: Any, talks: list[Chat]) -> Runs:
    """Return LlamaIndex's two models over one prompt."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.huggingface import HuggingFaceLLM

    from amulet_integrations.llama_index import AmuletLLM

    messages = [ChatMessage(role=m["role"], content=m["content"]) for m in talks[0]]

    @functools.cache
    def peer_of(n: int) -> Any:
        return HuggingFaceLLM(
            model=theirs,
            tokenizer=contenders.tokenizer(),
            max_new_tokens=n,
            context_window=8192,
            is_chat_model=True,
            generate_kwargs={"do_sample": False},
        )

    def ours(n: int) -> None:
        AmuletLLM(amulet=amulet, max_tokens=n, preference=USERS[0][0]).chat(messages)

    return {LLAMA_PEER: lambda n: peer_of(n).chat(messages), LLAMA_AMULET: ours}


def forward_tokens(model: Any, run: Callable[[int], object], n: int) -> int:
    """Return the number of tokens that a contender decodes, by its forward passes."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = model.register_forward_pre_hook(count)
    try:
        run(n)
    finally:
        handle.remove()
    return passes


def pairs(
    theirs: Any, amulet: Any, compiled: Any | None, talks: list[Chat]
) -> list[tuple[Runs, str, float | None, int]]:
    """Return the possible comparisons: contenders, claim, target, number of the peer's answers."""
    target = 5.0 if theirs.dtype == torch.bfloat16 else None
    found = [
        (
            direct(theirs, amulet, talks),
            "eight steered users together / eight plain in turn",
            target,
            8,
        ),
        (
            direct(theirs, amulet, [[{"role": "user", "content": text}] for _, text in USERS]),
            "the same, questions without passages",
            None,
            8,
        ),
    ]
    if compiled is not None:
        claim = "the same, compiled"
        found.append((direct(theirs, compiled, talks), claim, target, 8))
    for make, claim, bound, answers in (
        (langchain, "ChatAmulet.batch, eight steered / ChatHuggingFace.batch, plain", 4.0, 8),
        (llama_index, "AmuletLLM, one steered / HuggingFaceLLM, plain", None, 1),
    ):
        try:
            found.append((make(theirs, amulet, talks), claim, bound, answers))
        except ImportError as error:
            print(f"left out: {claim} ({error})")
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=3, tokens=32)
    options = measure.read_options(parser, arguments, dtypes=["bfloat16"])
    talks = chats(128 if options.quick else 256)
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    for dtype in options.dtypes:
        theirs = contenders.load(options.model, dtype)
        packed = contenders.load(options.model, dtype, pack=True)
        amulet = contenders.amulet_over(packed, drafts=True)
        compiled = None if options.quick else contenders.amulet_over(packed, compile=True)
        figures[name_of(dtype)] = {}
        for runs, claim, target, answers in pairs(theirs, amulet, compiled, talks):
            peer, own = list(runs)
            decoded = forward_tokens(theirs, runs[peer], 4)
            assert decoded == 4 * answers, f"{peer}: {decoded} tokens, not {4 * answers}"
            warm = measure.warm_up(runs)
            times = measure.per_token(runs, options.rounds, options.tokens)
            shown: dict[str, Any] = measure.print_times(times, peer)
            whole = {name: o.whole(options.tokens) for name, o in times.items()}
            for name, took in whole.items():
                rates = [answers * options.tokens / ms * 1e3 for ms in took]
                print(f"{name:36} {Spread.of(rates)} tokens per second, prefill included")
                shown[name]["tokens_per_s"] = asdict(Spread.of(rates))
                shown[name]["warm_up_s"] = warm[name]
            figures[name_of(dtype)] |= shown
            text = f"{options.model}, {name_of(dtype)}, tokens per second: {claim}"
            claims.append(at_least(text, target, whole[peer], whole[own]))
    return measure.report("users", options, claims, figures)


if __name__ == "__main__":
    main()
