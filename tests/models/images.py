"""Tiny models that read images, with random weights, and their processors."""

from __future__ import annotations

import base64
from functools import cache
from io import BytesIO
from typing import Any, Literal

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from tests.coverage.models import Entry, build
from tests.models import IM_END, VOCAB_SIZE, byte_tokenizer

# ChatML whose contents are texts or parts, as the templates of such models have it.
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<image>' }}{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

Kind = Literal["llava", "idefics3"]
KINDS: tuple[Kind, ...] = ("llava", "idefics3")
SIDE = 28  # pixels of a tile
TOKENS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
TOKENS += tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))


def image_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte tokenizer with the tokens of images, from 259 on."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in TOKENS], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def processor(kind: Kind) -> ProcessorMixin:
    """Return a model's processor; an image is 4 columns, of Idefics 3's each tile."""
    tokenizer = image_tokenizer()
    square = {"height": SIDE, "width": SIDE}
    if kind == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE)


def image_model(kind: Kind, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model of a kind, in eval mode; an image changes its answers."""
    tokens = image_tokenizer()
    extra: dict[str, Any] = {
        "text_config.vocab_size": VOCAB_SIZE,
        "text_config.eos_token_id": IM_END,
        "vision_config.image_size": SIDE,
        "vision_config.patch_size": 14 if kind == "llava" else 7,
        "image_token_id": tokens.convert_tokens_to_ids("<image>"),
    }
    model = build(Entry(kind, kind, True, extra), seed, 2.5)
    model.generation_config.eos_token_id = IM_END
    return model.to(dtype)


@cache
def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """Return an image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def png(seed: int = 0, width: int = 40, height: int = 30) -> bytes:
    """Return the same as a PNG file."""
    stored = BytesIO()
    picture(seed, width, height).save(stored, "PNG")
    return stored.getvalue()


def data_url(seed: int = 0) -> str:
    """Return the same as a data: URL."""
    return f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}"


def asks(*parts: Any) -> list[dict[str, Any]]:
    """Return a chat whose user says these parts, texts and images."""
    return [{"role": "user", "content": list(parts)}]
