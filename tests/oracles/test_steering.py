"""Steering against its formula, written out token by token without any of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amulet import Amulet, Preference, Request
from tests.decoding.test_loop_guard import literal as repeated
from tests.models import random_model

QUESTION = "Why is the sky blue?"
TOKENS = 12
OFF = {"floor": 0.0, "focus": 0.0, "loop_guard": 0}
DEFAULT = {"strength": 0.35, "focus": 1.0, "floor": 0.1, "loop_guard": 4}

Chat = list[dict[str, str]]


@torch.inference_mode()
def written_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wishes: Sequence[Preference],
    *,
    strength: float,
    focus: float = 0.0,
    floor: float = 0.0,
    loop_guard: int = 0,
    system: str = "",
    begun: str = "",
) -> list[int]:
    """Decode with one forward pass per row and token, each prompt a chat of its own."""

    def prompt(text: str) -> list[int]:
        chat = [{"role": "system", "content": system}] if system else []
        chat += [{"role": "user", "content": text}]
        chat += [{"role": "assistant", "content": begun}] if begun else []
        ids: list[int] = tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=not begun,
            continue_final_message=bool(begun),
            return_dict=False,
        )
        return ids

    total = max(1.0, sum(abs(wish.weight) for wish in wishes))
    shares = [wish.weight / total for wish in wishes]
    wanted = "\n".join(wish.text for wish in wishes if wish.weight > 0)
    prompts = [prompt(f"{QUESTION}\n\n{wish.text}") for wish in wishes]
    prompts += [prompt(QUESTION), prompt(wanted or "-")]
    answer: list[int] = []
    while len(answer) < TOKENS and tokenizer.eos_token_id not in answer:
        *own, r, u = (
            model(torch.tensor([ids + answer])).logits[0, -1].double().log_softmax(-1)
            for ids in prompts
        )
        scores = r.clone()
        for share, p in zip(shares, own, strict=True):
            scores += share * ((p - r) + strength * (p - r))
            scores += max(share, 0.0) * strength * focus * (p - u)
        if loop_guard and answer:
            for token, cost in repeated(answer, loop_guard).items():
                scores[token] -= cost
        if floor:
            likely = [p for share, p in zip(shares, own, strict=True) if share > 0] or [r]
            least = torch.tensor(floor).log()
            kept = torch.stack([p >= p.max() + least for p in likely]).any(dim=0)
            scores[~kept] = -torch.inf
        answer.append(int(scores.argmax()))
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wish", "options"),
    [
        ("Talk like a pirate.", DEFAULT),
        ("Answer in one short sentence.", {"strength": 2.0}),  # Linear Alignment
    ],
    ids=["default", "linear alignment"],
)
def test_an_answer_follows_the_formula(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase], wish: str, options: dict[str, Any]
) -> None:
    model, tokenizer = smollm
    expected = written_out(model, tokenizer, [Preference(wish)], **options)
    chat = [{"role": "user", "content": QUESTION}]
    settings = {**OFF, **options, "placement": "user", "max_new_tokens": TOKENS}
    plain = {"messages": chat, "max_new_tokens": TOKENS}
    # A plain answer beside it changes nothing.
    both = Amulet(model, tokenizer).batch([{**plain, "preference": wish, **settings}, plain])
    assert list(both[0].token_ids) == expected  # type: ignore[union-attr]


BRIEF, RUDE, KIND = Preference("Be brief."), Preference("Be rude.", -0.5), Preference("Be kind.", 2)
CASES: list[tuple[list[Preference], dict[str, Any]]] = [
    ([BRIEF], DEFAULT),
    ([BRIEF], {"strength": 2.0, "focus": 0.5, "loop_guard": 1}),
    ([BRIEF, KIND], {"strength": 1.0, "focus": 2.0, "floor": 0.1, "loop_guard": 2}),
    ([BRIEF, RUDE], {**DEFAULT, "strength": 1.5}),
    ([RUDE], {**DEFAULT, "strength": 1.5}),  # steered away from: no row of its own for focus
    ([BRIEF], {**DEFAULT, "strength": -0.5, "focus": 0.0, "loop_guard": 0}),
    ([BRIEF], {"strength": 2.0, "system": "You are a poet.", "focus": 1.0}),
    ([BRIEF], {"strength": 2.0, "begun": "The sky", "focus": 1.0, "loop_guard": 2}),
]


def request_of(wishes: Sequence[Preference], options: dict[str, Any]) -> dict[str, Any]:
    chat: Chat = [{"role": "user", "content": QUESTION}]
    if "system" in options:
        chat.insert(0, {"role": "system", "content": options["system"]})
    if "begun" in options:
        chat.append({"role": "assistant", "content": options["begun"]})
    given = {name: value for name, value in options.items() if name not in ("system", "begun")}
    settings = {**OFF, **given, "placement": "user", "max_new_tokens": TOKENS}
    return {"messages": chat, "preference": list(wishes), **settings}


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    model = random_model("qwen2", dtype=torch.float64)
    model.config.max_position_embeddings = 2048
    return model


@pytest.fixture(scope="module")
def expected(tiny: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, ...]]:
    return [tuple(written_out(tiny, tokenizer, *case[:1], **case[1])) for case in CASES]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_kind_of_request_follows_the_formula(
    tiny: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    expected: list[tuple[int, ...]],
    number: int,
) -> None:
    amulet = Amulet(tiny, tokenizer, prefix_cache_bytes=0)
    assert amulet.chat(**request_of(*CASES[number])).token_ids == expected[number]


@pytest.mark.parametrize("options", [{}, {"prefix_cache_bytes": 0}, {"max_rows": 2}], ids=str)
def test_together_and_after_each_other_they_are_what_they_are_alone(
    tiny: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    expected: list[tuple[int, ...]],
    options: dict[str, Any],
) -> None:
    """Rows of 1, 2, 3 and 4 mixed; the second time from kept prefixes, and even with 2 rows."""
    amulet = Amulet(tiny, tokenizer, **options)
    chat = [{"role": "user", "content": QUESTION}]
    plain = amulet.chat(chat, max_new_tokens=TOKENS).token_ids
    requests = [request_of(*case) for case in CASES]
    requests += [{"messages": chat, "max_new_tokens": TOKENS}]
    for _ in range(2):
        replies = amulet.batch(requests)
        assert [reply.token_ids for reply in replies] == [*expected, plain]  # type: ignore[union-attr]


@pytest.mark.parametrize("guard", [0, 1, 3])
def test_drafts_change_no_token(
    tokenizer: PreTrainedTokenizerFast, guard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer copies from its prompt, so that drafts are right, and repeats itself meanwhile."""
    from amulet.decoding.engine import Engine
    from tests.models import ScriptedModel

    text = "the cat and the cat and the cat and the cat and the dog"
    accepted = []
    accept = Engine._accept

    def watched(self: Engine, drafts: Any, logits: torch.Tensor) -> None:
        accepted.append(logits.shape[1])
        accept(self, drafts, logits)

    monkeypatch.setattr(Engine, "_accept", watched)
    replies = []
    for drafts in (True, False):
        amulet = Amulet(ScriptedModel(tokenizer, text), tokenizer, drafts=drafts)
        chat = [{"role": "user", "content": text}]
        options = {"strength": 1.0, "loop_guard": guard, "max_new_tokens": 80, "trace": True}
        replies.append(amulet.chat(chat, preference="Be brief.", **options))
        assert (max(accepted) > 1) is drafts
        accepted.clear()
    drafted, undrafted = replies
    assert drafted.token_ids == undrafted.token_ids
    assert drafted.trace == undrafted.trace


def test_rows_of_each_kind(tiny: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = Amulet(tiny, tokenizer)
    chat = [{"role": "user", "content": QUESTION}]

    def rows(**options: Any) -> int:
        source = {} if "prompt" in options else {"messages": chat}
        return len(amulet.prepare(Request(**source, **options)).generation.prompts)

    assert rows() == 1
    assert rows(preference="Be brief.") == 3
    assert rows(preference="Be brief.", focus=0) == 2
    assert rows(preference="Be brief.", strength=0) == 1
    assert rows(preference="Be brief.", strength=0, trace=True) == 2
    assert rows(preference="Be brief.", strength=-0.5) == 2
    assert rows(preference=["Be brief.", "Be kind."]) == 4
    assert rows(preference=Preference("Be rude.", -1)) == 2
    assert rows(preference=["Be brief.", Preference("Be rude.", -1)]) == 4
    assert rows(prompt="The sky", preference="Be brief.") == 2


def test_a_template_that_refuses_the_preference_alone_has_no_focus(
    tiny: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    import copy

    picky = copy.deepcopy(tokenizer)
    picky.chat_template = (
        "{%- if messages[0].content != 'Hi' and messages[0].role == 'user' "
        "and not messages[0].content.startswith('Hi') -%}"
        "{{ raise_exception('Say hi first.') }}{%- endif -%}" + str(tokenizer.chat_template)
    )
    amulet = Amulet(tiny, picky)
    chat = [{"role": "user", "content": "Hi"}]
    options = {"preference": "Be brief.", "strength": 1.0, "max_new_tokens": 8}
    reply = amulet.chat(chat, **options)
    assert reply.token_ids == amulet.chat(chat, **options, focus=0).token_ids
