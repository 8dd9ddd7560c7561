"""Checkpoints of models that read images, loaded by folder: their text is steered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from amulet import Amulet, Request
from amulet.models.loading import load_pretrained
from tests.coverage.check import STRENGTH, TOKENS, Reference
from tests.coverage.models import Entry, build
from tests.models import CHATML, byte_tokenizer

KINDS = ("qwen2_5_vl", "gemma4", "qwen3_5")
PARTS = CHATML.replace("message['content']", "message['content'][0]['text']")
# What guidance does, and nothing else.
PLAIN: dict[str, Any] = {
    "strength": STRENGTH,
    "floor": 0.0,
    "focus": 0.0,
    "loop_guard": 0,
    "max_new_tokens": TOKENS,
}
MESSAGES = [{"role": "user", "content": "Which tea?"}]


def save(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a whole tiny model with image tower, and the tokenizer."""
    build(Entry(kind, kind, image=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_answers_as_generate_does(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save(kind, tmp_path, tokenizer)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        type(build(Entry(kind, kind, image=True))).__name__
    ]
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    reference = Reference(whole)
    amulet = Amulet.from_pretrained(str(folder), device="cpu", dtype="float32")
    for preference in (None, "Be brief."):
        request = Request(messages=MESSAGES, preference=preference, **PLAIN)
        prompts = amulet.prepare(request).generation.prompts
        reply = amulet.start(request).read()
        assert reference.agrees([list(ids) for ids in prompts], list(reply.token_ids))
        assert len(set(reply.token_ids)) > 1


def test_a_template_that_only_the_processor_has(
    tmp_path: Path,
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    folder = save("qwen2_5_vl", tmp_path, tokenizer)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    model, loaded = load_pretrained(folder, device="cpu")
    assert loaded.chat_template == PARTS
    amulet = Amulet(model, loaded)
    (prompt,) = amulet.prepare(Request(messages=MESSAGES)).generation.prompts
    assert "Which tea?" in loaded.decode(prompt)
    assert amulet.chat(MESSAGES, max_new_tokens=2).token_ids


def test_vision_weights_stay_unloaded_where_there_is_a_class_for_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save("qwen3_5", tmp_path, tokenizer)
    model, _ = load_pretrained(folder, device="cpu", pack=False)
    assert not [name for name, _ in model.named_parameters() if "visual" in name]
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
