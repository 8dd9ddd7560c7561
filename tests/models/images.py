"""Tiny models that read images, with random weights, and their processors."""

from __future__ import annotations

import base64
from functools import cache
from io import BytesIO
from typing import Any, Literal, get_args

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from tests.coverage.models import Entry, build
from tests.coverage.tables import TEXT
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

Kind = Literal["llava", "idefics3", "qwen2_vl", "qwen2_5_vl", "gemma3"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SIDE = 28  # pixels of a tile
TOKENS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
TOKENS += tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))
TOKENS += ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TOKENS += ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
# What a template writes for an image, and the token of an image's columns.
SHOWN = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
SHOWN |= {"qwen2_5_vl": SHOWN["qwen2_vl"], "gemma3": "<start_of_image>"}
COLUMN = {"qwen2_vl": "<|image_pad|>", "qwen2_5_vl": "<|image_pad|>"}
COLUMN["gemma3"] = "<image_soft_token>"


class _Qwen2VLProcessor(Qwen2VLProcessor):
    """Transformers' own without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def image_tokenizer(kind: Kind = "llava") -> PreTrainedTokenizerFast:
    """Return the byte tokenizer with the tokens of images, from 259 on."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in TOKENS], special_tokens=True)
    tokenizer.chat_template = TEMPLATE.replace("<image>", SHOWN.get(kind, "<image>"))
    return tokenizer


def processor(kind: Kind) -> ProcessorMixin:
    """Return a model's processor; a tile of an image is 4 columns."""
    tokenizer = image_tokenizer(kind)
    template, square = tokenizer.chat_template, {"height": SIDE, "width": SIDE}
    if kind == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if kind == "idefics3":
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        )
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    if kind == "gemma3":
        names = {"boi": "<start_of_image>", "image": COLUMN[kind], "eoi": "<end_of_image>"}
        for name, token in names.items():
            setattr(tokenizer, f"{name}_token", token)
            setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        images = Gemma3ImageProcessorPil(size=square)
        return Gemma3Processor(images, tokenizer, template, image_seq_length=4)
    # Their images keep their shapes: 40x30 pixels are 3x2 columns.
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84})
    return _Qwen2VLProcessor(images, tokenizer, template)


PATCH = {"idefics3": 7, "gemma3": 7}


def image_model(kind: Kind, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model of a kind, in eval mode; an image changes its answers."""
    tokens = image_tokenizer()
    extra: dict[str, Any] = {
        "text_config.vocab_size": VOCAB_SIZE,
        "text_config.eos_token_id": IM_END,
        "vision_config.image_size": SIDE,
        "vision_config.patch_size": PATCH.get(kind, 14),
        "image_token_id": tokens.convert_tokens_to_ids(COLUMN.get(kind, "<image>")),
    }
    if kind == "gemma3":
        extra["mm_tokens_per_image"] = 4
    if kind == "qwen2_vl":  # its name for the size of what the tower returns
        extra["vision_config.hidden_size"] = TEXT["hidden_size"]
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
