"""Doubles for all tests: a byte tokenizer, random-weight real architectures, a scripted model."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationMixin,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

IM_START, IM_END, END_OF_TEXT = 256, 257, 258
VOCAB_SIZE = 320  # the 259 ids of the byte tokenizer, padded as real models pad theirs

Kind = Literal["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
KINDS: tuple[Kind, ...] = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids 0..255 are bytes, with ChatML as its template.

    256 is <|im_start|>, 257 <|im_end|> (end of turn, eos), 258 <|endoftext|> (padding).
    """
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


def _byte_characters() -> list[str]:
    """Byte-level BPE's alphabet: a printable byte is itself, the others U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + rank) for rank in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def random_model(
    kind: Kind,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = VOCAB_SIZE,
    head_dim: int = 16,
    biased: bool = False,
    layers: int = 4,
) -> PreTrainedModel:
    """Return a tiny real architecture with random weights, in eval mode.

    Hidden size 64, four heads over two key-value heads. Weights are drawn wide, so
    that logits differ clearly and greedy text varies. Mistral, Gemma 2 and Gemma 3 slide a window
    of 16 tokens, shorter than the tests' prompts; the Gemmas in every second layer.
    """
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": IM_END,
        "pad_token_id": END_OF_TEXT,
    }
    alternating = ["sliding_attention", "full_attention"] * (layers // 2)
    configs: dict[Kind, tuple[type[PretrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, {"attention_bias": biased, "mlp_bias": biased}),
        "qwen2": (Qwen2Config, {"use_sliding_window": False}),
        "qwen3": (Qwen3Config, {}),
        "mistral": (MistralConfig, {"sliding_window": 16}),
        "gemma2": (Gemma2Config, {"sliding_window": 16, "layer_types": alternating}),
        "gemma3": (Gemma3TextConfig, {"sliding_window": 16, "layer_types": alternating}),
    }
    config_class, further = configs[kind]
    config = config_class(**sizes, **further)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kind in ("gemma2", "gemma3"):
        # Gemma multiplies its embeddings by sqrt(hidden), which would drown such thin layers.
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.3)
    return model.to(dtype).eval()


class ScriptedModel(PreTrainedModel, GenerationMixin):
    """A model that answers what the test lists; it "attends" by reading its history off the cache.

    Each step writes the token ids into the keys of its one layer and reads the whole row back
    from what the cache returns. A cache that mixes up, drops or misplaces rows therefore changes
    the answer, and rows are independent of each other, whatever their lengths and padding.

    Args:
        tokenizer: encodes the answers.
        answers: what to say. With a mapping, the first key that the prompt contains picks the
            answer (so a preferred and a base prompt can differ); "" as the last key matches any
            prompt. A list of ids is emitted as it is; a string gets the end of turn appended.

    The answer has begun where the row ends with its beginning: `emitted` is the longest beginning
    of the answer that the row ends with. A prompt should therefore not end in the same characters
    as the answer begins with; the ChatML generation prompt ends in a newline.

    The scripted token has logit 20, all others 0. `calls` lists the shape of `input_ids` of every
    forward call; set `fail_with` to an exception to raise it on the next call, once. An interrupt
    reaches the main thread instead.
    """

    config_class = LlamaConfig

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        answers: str | list[int] | Mapping[str, str | list[int]],
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(
            LlamaConfig(
                vocab_size=vocab_size or max(VOCAB_SIZE, len(tokenizer)),
                hidden_size=2,
                intermediate_size=2,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=2,
                max_position_embeddings=4096,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.weight = torch.nn.Parameter(torch.zeros(1))  # device and dtype are a parameter's
        self.calls: list[tuple[int, ...]] = []
        self.fail_with: BaseException | None = None
        self._tokenizer = tokenizer
        listed = answers if isinstance(answers, Mapping) else {"": answers}
        self._answers = {
            key: [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
            if isinstance(answer, str)
            else list(answer)
            for key, answer in listed.items()
        }
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits `[rows, kept positions, vocab]`; the mask is `[rows, keys]` or 4-D."""
        self.calls.append(tuple(input_ids.shape))
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            if not isinstance(error, KeyboardInterrupt):
                raise error
            # As Ctrl-C does: it reaches the main thread, while this one goes on.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.3)  # it cancels before this pass is over
        history, new = input_ids, input_ids.shape[1]
        if past_key_values is not None:
            keys = input_ids.to(torch.float32)[:, None, :, None].expand(-1, 1, -1, 2)
            keys, _values = past_key_values.update(keys, torch.zeros_like(keys), 0)
            history = keys[:, 0, :, 0].round().long()
        total = history.shape[1]
        if isinstance(logits_to_keep, int):
            kept = list(range(new))[-logits_to_keep:] if logits_to_keep else list(range(new))
        else:
            kept = logits_to_keep.tolist()
        logits = torch.zeros(len(history), len(kept), self.config.vocab_size)
        for row, ids in enumerate(history):
            for slot, position in enumerate(kept):
                end = total - new + position + 1
                seen = self._visible(attention_mask, row, position, end)
                logits[row, slot, self._next(ids[:end][seen].tolist())] = 20.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    @staticmethod
    def _visible(mask: torch.Tensor | None, row: int, position: int, end: int) -> torch.Tensor:
        if mask is None:
            return torch.ones(end, dtype=torch.bool)
        seen = (mask[row, 0, position] if mask.dim() == 4 else mask[row])[:end]
        return seen == 0 if seen.is_floating_point() else seen.bool()

    def _next(self, ids: list[int]) -> int:
        text = self._tokenizer.decode(ids)
        answer = next((answer for key, answer in self._answers.items() if key in text), [])
        emitted = max(
            (n for n in range(min(len(answer), len(ids)) + 1) if ids[len(ids) - n :] == answer[:n]),
            default=0,
        )
        return answer[emitted] if emitted < len(answer) else int(self._tokenizer.eos_token_id)
