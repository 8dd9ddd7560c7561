"""Other architectures: decoded exactly, or refused before anything is decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    Cohere2Config,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Starcoder2Config,
    T5Config,
)

from amulet import Amulet, ModelError, Request
from amulet.backends.transformers.backend import TransformersBackend, windows
from amulet.backends.transformers.restarting import RestartingBackend
from tests.models import IM_END, VOCAB_SIZE, random_model

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": IM_END,
    "pad_token_id": None,
}
MODERN = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i for i in range(8)],
}
GEMMA = {
    **MODERN,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}


TINY: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32}


def vision(sections: list[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return {
        "text_config": {**MODERN, "max_position_embeddings": 512, "rope_parameters": rope},
        "vision_config": {"depth": 1, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 2},
        "image_token_id": 300,
        "video_token_id": 301,
    }


def longrope(length: int) -> PretrainedConfig:
    return Phi3Config(
        **MODERN,
        max_position_embeddings=512,
        original_max_position_embeddings=length,
        rope_parameters=dict(LONGROPE),
    )


def neo(kinds: list[str]) -> PretrainedConfig:
    return GPTNeoConfig(
        **{k: v for k, v in SIZES.items() if "num" not in k},
        num_layers=2,
        num_heads=4,
        attention_types=[[kinds, 1]],
        window_size=16,
    )


def make(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    image = isinstance(config, Qwen2VLConfig | Qwen2_5_VLConfig)
    auto: Any = AutoModelForImageTextToText if image else AutoModelForCausalLM
    return auto.from_config(config).double().eval()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (neo(["global", "local"]), "local layers"),
        (BloomConfig(**{**SIZES, "n_layer": 2, "n_head": 4}), "position_ids"),
        (FalconConfig(**SIZES, alibi=True), "ALiBi"),
        (DogeConfig(**MODERN), "masks of its own"),
    ],
    ids=lambda it: getattr(it, "model_type", None),
)
def test_what_is_wrong_in_rows_is_decoded_row_by_row(
    config: PretrainedConfig,
    said: str,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    amulet = Amulet(make(config), tokenizer)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "amulet"]
    assert config.model_type in message
    assert said in message
    assert "docs/models.md" in message
    check(amulet, ["Hi", "A question that is somewhat longer than the other one.", "Why?"])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (AutoModelForSeq2SeqLM, T5Config(**TINY, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        (AutoModel, LlamaConfig(**TINY, num_hidden_layers=1, num_attention_heads=2)),
    ],
    ids=["encoder-decoder", "no head"],
)
def test_only_what_writes_token_by_token_is_decoded(
    kind: Any, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ModelError, match="decodes"):
        Amulet(kind.from_config(config), tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        neo(["global", "global"]),
        FalconConfig(**SIZES),
        FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
        Gemma4TextConfig(**GEMMA),
        Qwen2VLConfig(**vision([2, 3, 3])),
        Qwen2_5_VLConfig(**vision([2, 3, 3])),
        Phi3Config(**MODERN, max_position_embeddings=512),
        *map(longrope, (40, 128, 160)),  # below, between and above the lengths of the rows
    ],
    ids=lambda it: it.model_type,
)
def test_what_is_decoded_is_decoded_exactly(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    """In a batch of prompts of unlike length, against whole passes without a cache."""
    model = make(config)
    amulet = Amulet(model, tokenizer)
    check(amulet, ["Hi", "A question that is somewhat longer than the other one.", "Why?"])


WINDOW = {**MODERN, "max_position_embeddings": 512, "sliding_window": 16}
HALF = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
HEADS = {"head_dim": 16}


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        (LlamaConfig(**WINDOW), [0, 0]),  # its class has no such field, and its layers no window
        (Qwen2Config(**WINDOW), [0, 0]),
        (Qwen2Config(**WINDOW, use_sliding_window=True, max_window_layers=1), [0, 16]),
        (MistralConfig(**WINDOW), [16, 16]),
        (MistralConfig(**{**WINDOW, "sliding_window": None}), [0, 0]),
        (Gemma2Config(**HALF, **HEADS), [16, 0]),
        (Gemma3TextConfig(**HALF, **HEADS), [16, 0]),
        (Phi3Config(**WINDOW), [16, 16]),
        (Starcoder2Config(**WINDOW), [16, 16]),
        (Cohere2Config(**HALF), [16, 0]),
    ],
    ids=lambda it: getattr(it, "model_type", str(it)),
)
def test_layers_have_the_windows_that_their_model_has(
    config: PretrainedConfig, seen: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    """By whole passes, and by `generate` without its cache, which always has a window."""
    model = make(config)
    assert windows(model) == seen
    amulet = Amulet(model, tokenizer)
    check(amulet, ["Hi", "A question that is somewhat longer than the other one.", "Why?"])
    text = "A text that is longer than two of the windows there are."
    ids = torch.tensor([amulet.encode(text)])
    options: Any = {"do_sample": False, "use_cache": False, "max_new_tokens": 12}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    reply = amulet.complete(text, max_new_tokens=12)
    assert list(reply.token_ids) == expected[0, ids.shape[1] :].tolist()


def check(amulet: Amulet, texts: list[str]) -> None:
    requests = [
        Request(
            messages=[{"role": "user", "content": text}],
            preference=preference,
            strength=2.0,
            floor=0.0,
            focus=1.0,
            loop_guard=0,
            max_new_tokens=8,
        )
        for text, preference in zip(texts, (None, "Be brief.", "In verse."), strict=False)
    ]
    prompts = [amulet.prepare(request).generation.prompts for request in requests]
    for reply, rows in zip(amulet.batch(requests), prompts, strict=True):
        got: list[int] = []
        for _ in getattr(reply, "token_ids", ()):
            with torch.no_grad():
                logs = [
                    amulet.model(torch.tensor([[*row, *got]])).logits[0, -1].log_softmax(-1)
                    for row in rows
                ]
            mixed = logs[0]
            if len(rows) > 1:
                p, u, r = logs
                mixed = p + 2.0 * ((p - r) + (p - u))
            got.append(int(mixed.argmax()))
        assert list(getattr(reply, "token_ids", ())) == got
        assert got


def test_longrope_that_never_changes_is_like_any_other(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make(longrope(128))
    assert type(Amulet(model, tokenizer)._engine.backend) is RestartingBackend
    model.config.max_position_embeddings = 128
    amulet = Amulet(model, tokenizer)
    assert type(amulet._engine.backend) is TransformersBackend
    check(amulet, ["Hi", "A longer one."])
    long = amulet.chat([{"role": "user", "content": "Hi"}], max_new_tokens=500)
    assert long.usage.prompt_tokens + len(long.token_ids) <= 128


def test_a_forward_that_hands_its_options_on(tokenizer: PreTrainedTokenizerFast) -> None:
    class Counting(LlamaForCausalLM):
        calls = 0

        def forward(self, *args: Any, **options: Any) -> Any:
            self.calls += 1
            return super().forward(*args, **options)

    model = random_model("llama")
    expected = Amulet(model, tokenizer).complete("hi", max_new_tokens=8).token_ids
    model.__class__ = Counting
    assert Amulet(model, tokenizer).complete("hi", max_new_tokens=8).token_ids == expected
    assert getattr(model, "calls", 0) > 0
