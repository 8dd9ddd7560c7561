"""Answers about images against Transformers' own `generate`, and against the formula by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from amulet import Amulet
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.backends.transformers.vision import why_no_images
from tests.models.images import (
    KINDS,
    Kind,
    asks,
    data_url,
    image_model,
    picture,
    png,
    processor,
)

# InternVL's processor in older versions of Transformers
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

TOKENS = 8
WISH = "Be brief."
PLAIN: dict[str, Any] = {"focus": 0.0, "floor": 0.0, "loop_guard": 0}


class Pair:
    """A model with its processor: what `Amulet` is compared with."""

    def __init__(self, kind: Kind) -> None:
        self.model: Any = image_model(kind)
        self.processor: Any = processor(kind)

    def amulet(self, **options: Any) -> Amulet:
        amulet = Amulet(self.model, self.processor, **options)
        # Prefills take several passes, and parts of them are shared.
        amulet._engine.backend.chunk, amulet._engine.backend.worth_sharing = 24, 8
        return amulet

    def inputs(self, messages: list[dict[str, Any]], images: Sequence[Image.Image]) -> Any:
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        made = self.processor(
            images=[list(images)] if images else None,  # of one chat
            text=[text],
            return_tensors="pt",
            add_special_tokens=False,
        )
        return made.to(self.model.dtype)

    def generate(self, messages: list[dict[str, Any]], images: Sequence[Image.Image]) -> list[int]:
        made = self.inputs(messages, images)
        out = self.model.generate(**made, max_new_tokens=TOKENS, do_sample=False)
        answer: list[int] = out[0, made["input_ids"].shape[1] :].tolist()
        return answer

    @torch.inference_mode()
    def by_hand(
        self, rows: Sequence[tuple[Any, Sequence[Image.Image]]], weights: Sequence[float]
    ) -> list[int]:
        """Decode with one whole pass per row and token: r + Σ w·(p − r), the base row last."""
        made = [self.inputs(messages, images) for messages, images in rows]
        answer: list[int] = []
        while len(answer) < TOKENS and self.processor.tokenizer.eos_token_id not in answer:
            *others, base = (self._scores(row, answer) for row in made)
            scores = base + sum(
                weight * (other - base) for weight, other in zip(weights, others, strict=True)
            )
            answer.append(int(scores.argmax()))
        return answer

    def _scores(self, row: Any, answer: list[int]) -> torch.Tensor:
        said = torch.tensor([answer], dtype=torch.long)
        ids = torch.cat([row["input_ids"], said], dim=1)
        row = {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in {"token_type_ids", "mm_token_type_ids"} & set(row):  # 0 is text
            row[name] = torch.cat([row[name], torch.zeros_like(said)], dim=1)
        logits: torch.Tensor = self.model(**row).logits[0, -1]
        return logits.log_softmax(-1)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    pair = Pair(request.param)
    if (why := why_no_images(pair.model, pair.processor)) is not None:
        assert "newer Transformers" in why
        pytest.skip(why)
    return pair


# Chats with the images' numbers: one, several, of several turns, and of unlike shapes.
CHATS: dict[str, list[tuple[str, list[str | int]]]] = {
    "image first": [("user", [1, "Which tea?"])],
    "image last": [("user", ["Which tea?", 2])],
    "two": [("user", ["This", 1, "or that", 2, "?"])],
    "the same twice": [("user", [1, 1, "Alike?"])],
    "alone": [("user", [3])],
    "turns": [
        ("system", ["You know teas."]),
        ("user", [1, "Which tea?"]),
        ("assistant", ["Green."]),
        ("user", ["And this?", 4]),
    ],
    "none": [("user", ["Which tea?"])],
}
SIZES = {1: (40, 30), 2: (30, 40), 3: (60, 60), 4: (20, 50)}


def chat_of(name: str, given: bool) -> list[dict[str, Any]]:
    """Return a chat as Amulet gets it, or as a template does, without the images themselves."""

    def part(told: str | int) -> dict[str, Any]:
        if isinstance(told, str):
            return {"type": "text", "text": told}
        return {"type": "image", **({"image": picture(told, *SIZES[told])} if given else {})}

    return [
        {"role": role, "content": list(map(part, told)) if role == "user" else told[0]}
        for role, told in CHATS[name]
    ]


def images_of(name: str) -> list[Image.Image]:
    numbers = [told for _, parts in CHATS[name] for told in parts if isinstance(told, int)]
    return [picture(number, *SIZES[number]) for number in numbers]


def wished(messages: list[dict[str, Any]], wish: str = WISH) -> list[dict[str, Any]]:
    """Return a template's chat with the preference at the end of the last user turn."""
    *before, last = messages
    ending = {"type": "text", "text": f"\n\n{wish}"}
    return [*before, {**last, "content": [*last["content"], ending]}]


@pytest.mark.parametrize("name", CHATS)
def test_a_plain_answer_is_that_of_generate(pair: Pair, name: str) -> None:
    expected = pair.generate(chat_of(name, given=False), images_of(name))
    reply = pair.amulet().chat(chat_of(name, given=True), max_new_tokens=TOKENS)
    assert list(reply.token_ids) == expected
    assert len(set(expected)) > 2  # a model that repeats itself tells little


def test_an_image_changes_the_answer(pair: Pair) -> None:
    answers = {
        tuple(pair.generate(chat_of("alone", given=False), [picture(number)]))
        for number in range(4)
    }
    assert len(answers) > 1


@pytest.mark.parametrize("name", CHATS)
def test_a_steered_answer_follows_the_formula(pair: Pair, name: str) -> None:
    plain, images = chat_of(name, given=False), images_of(name)
    expected = pair.by_hand([(wished(plain), images), (plain, images)], [1 + 2.0])
    amulet = pair.amulet()
    reply = amulet.chat(
        chat_of(name, given=True), preference=WISH, max_new_tokens=TOKENS, strength=2.0, **PLAIN
    )
    assert list(reply.token_ids) == expected


def test_the_row_of_focus_has_no_image(pair: Pair) -> None:
    plain, images = chat_of("image first", given=False), images_of("image first")
    # p and the preference alone: r + (1 + g + g·focus)·(p − r) − g·focus·(u − r).
    rows = [(wished(plain), images), ([{"role": "user", "content": WISH}], []), (plain, images)]
    expected = pair.by_hand(rows, [1 + 0.5 + 0.5, -0.5])
    reply = pair.amulet().chat(
        chat_of("image first", given=True),
        preference=WISH,
        max_new_tokens=TOKENS,
        strength=0.5,
        **{**PLAIN, "focus": 1.0},
    )
    assert list(reply.token_ids) == expected


def test_answers_are_the_same_in_a_batch(pair: Pair) -> None:
    requests = [
        {"messages": chat_of(name, given=True), "preference": wish, "max_new_tokens": TOKENS}
        for name, wish in (("image first", WISH), ("image last", None), ("none", WISH))
    ]
    together = pair.amulet().batch(requests)
    alone = [pair.amulet(prefix_cache_bytes=0).batch([request])[0] for request in requests]
    assert together == alone


def test_a_row_is_reused_for_the_same_image_alone(pair: Pair) -> None:
    """Placeholders of all images are the same ids: rows of one must not serve another."""
    amulet = pair.amulet()
    question = ["Which tea is this, and where does it grow?"]
    before = pair.inputs(asks({"type": "image"}), [picture(1)])["input_ids"].shape[1]

    def asked(image: Any) -> Any:
        part = {"type": "image", "image": image}
        return amulet.chat(asks(part, *question), max_new_tokens=TOKENS)

    first, again, other = asked(picture(1)), asked(png(1)), asked(picture(2))
    assert again == first
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert other.usage.cached_tokens < before  # not one column of the image
    fresh = pair.amulet().chat(
        asks({"type": "image_url", "image_url": {"url": data_url(2)}}, *question),
        max_new_tokens=TOKENS,
    )
    assert other == fresh


def test_packed_layers_attend_to_the_whole_image() -> None:
    """Gemma 3's columns attend to later ones of their image; the C code's layers are causal."""
    plain, packed = (image_model("gemma3", torch.float32) for _ in range(2))
    pack_linears(packed, True)
    chat = chat_of("two", given=True)
    options = {"preference": WISH, "max_new_tokens": TOKENS}
    expected = Amulet(plain, processor("gemma3")).chat(chat, **options)
    assert Amulet(packed, processor("gemma3")).chat(chat, **options) == expected
