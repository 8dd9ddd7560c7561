"""Tiny models that read images, with random weights, and their processors."""

from __future__ import annotations

import base64
import sys
from functools import cache, partial
from importlib import import_module
from io import BytesIO
from types import SimpleNamespace
from typing import Any, Literal, get_args
from unittest import mock

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from tests.coverage.models import Entry, build
from tests.coverage.tables import TEXT, VISION
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

Kind = Literal[
    "llava",
    "llava_next",
    "llava_onevision",
    "pixtral",
    "mistral3",
    "idefics3",
    "smolvlm",
    "internvl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "gemma3",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
SIDE = 28  # pixels of a tile
TOKENS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
TOKENS += tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))
TOKENS += ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TOKENS += ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
TOKENS += ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<img>", "<IMG_CONTEXT>", "</img>")
# What a template writes for an image, and the token of an image's columns.
SHOWN = {"gemma3": "<start_of_image>"}
COLUMN = {"gemma3": "<image_soft_token>"}
for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
    SHOWN[name] = "<|vision_start|><|image_pad|><|vision_end|>"
    COLUMN[name] = "<|image_pad|>"
for name, token in {"pixtral": "[IMG]", "mistral3": "[IMG]", "internvl": "<IMG_CONTEXT>"}.items():
    SHOWN[name] = COLUMN[name] = token
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]  # of LLaVA-NeXT's tiles


def _without_videos(kind: Any) -> Any:
    """Return Transformers' own processor without its part for videos, which needs torchvision."""

    class WithoutVideos(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    videos = SimpleNamespace(num_frames=1, fps=1, model_input_names=[])
    return partial(WithoutVideos, video_processor=videos)


def _pixtral_processor() -> Any:
    """Return Transformers' own, which imports torchvision but does without it."""
    absent = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in absent}):
        return import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor


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
    if kind in ("llava", "llava_next"):
        tiles: Any = {"size": {"shortest_edge": SIDE}, "crop_size": square}
        made: Any = LlavaProcessor
        images: Any = CLIPImageProcessorPil(**tiles)
        if kind == "llava_next":
            made = LlavaNextProcessor
            images = LlavaNextImageProcessorPil(**tiles, image_grid_pinpoints=GRIDS)
        return made(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if kind == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=GRIDS)
        return _without_videos(LlavaOnevisionProcessor)(
            images,
            tokenizer,
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            chat_template=template,
        )
    if kind in ("pixtral", "mistral3"):  # their images keep their shapes, a row's end is a token
        images = PixtralImageProcessorPil(size={"longest_edge": 2 * SIDE}, patch_size=14)
        return _pixtral_processor()(
            images,
            tokenizer,
            patch_size=14 if kind == "pixtral" else 7,
            spatial_merge_size=1 if kind == "pixtral" else 2,
            chat_template=template,
        )
    if kind == "internvl":
        own = {"start_image": "<img>", "context_image": COLUMN[kind], "end_image": "</img>"}
        _name_tokens(tokenizer, {**own, "video": "<|video_pad|>"})
        images = GotOcr2ImageProcessorPil(size=square, max_patches=2)
        return _without_videos(InternVLProcessor)(
            images, tokenizer, image_seq_length=4, chat_template=template
        )
    if kind == "smolvlm":
        images = SmolVLMImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        )
        with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", str):
            return _without_videos(SmolVLMProcessor)(
                images, tokenizer, image_seq_len=4, chat_template=template
            )
    if kind == "idefics3":
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        )
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    if kind == "gemma3":
        own = {"boi": "<start_of_image>", "image": COLUMN[kind], "eoi": "<end_of_image>"}
        _name_tokens(tokenizer, own)
        images = Gemma3ImageProcessorPil(size=square)
        return Gemma3Processor(images, tokenizer, template, image_seq_length=4)
    # Their images keep their shapes: 40x30 pixels are 3x2 columns.
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84})
    made = Qwen3VLProcessor if kind.startswith("qwen3_vl") else Qwen2VLProcessor
    return _without_videos(made)(images, tokenizer, chat_template=template)


def _name_tokens(tokenizer: Any, names: dict[str, str]) -> None:
    for name, token in names.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))


PATCH = dict.fromkeys(("idefics3", "smolvlm", "internvl", "mistral3", "gemma3"), 7)


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
    if kind in ("llava_next", "llava_onevision"):
        extra["image_grid_pinpoints"] = GRIDS
    if kind == "mistral3":
        extra["vision_config.image_size"] = 2 * SIDE
    if kind.startswith("qwen3_vl"):
        extra |= {
            "vision_config.deepstack_visual_indexes": [0, 1],
            "vision_config.num_position_embeddings": 16,
        }
    if kind == "pixtral":  # LLaVA's class with another tower
        sizes = {name: VISION[name] for name in ("hidden_size", "intermediate_size")}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        extra["vision_config"] = PixtralVisionConfig(image_size=2 * SIDE, patch_size=14, **sizes)
        extra |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    if kind == "gemma3":
        extra["mm_tokens_per_image"] = 4
    if kind == "qwen2_vl":  # its name for the size of what the tower returns
        extra["vision_config.hidden_size"] = TEXT["hidden_size"]
    model = build(Entry(kind, "llava" if kind == "pixtral" else kind, True, extra), seed, 2.5)
    if kind == "qwen3_vl_moe":
        model.set_experts_implementation("eager")  # the grouped product takes no float64
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
