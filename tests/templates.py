"""Small tokenizers with chat templates that behave as the real families' do.

Each is a byte-level BPE without merges, so every text is encodable and one id is one byte. The
templates are written for these tests; what they copy is the behaviour, not the text, of the real
ones: which roles they take, what they insert, what they raise and which markers are tokens.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# SmolLM2, Qwen2.5: a default system text where the chat has none; system allowed anywhere.
CHATML = """
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\nYou are Smol, a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# Qwen3: tools in the system turn, thinking cut from earlier answers, enable_thinking.
QWEN = """
{%- set lead = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}
{{ '<|im_start|>system\n' + (lead + '\n\n' if lead else '') + '# Tools\n<tools>' }}
{%- for tool in tools -%}{{ '\n' + (tool | tojson) }}{%- endfor -%}
{{ '\n</tools>\nAnswer as <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n' }}
{%- elif lead -%}
{{ '<|im_start|>system\n' + lead + '<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set answer = message.content | default('', true) -%}
{%- if '</think>' in answer -%}
{%- set answer = answer.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' + answer }}
{%- for call in message.tool_calls or [] -%}
{{ '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- elif message.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- elif message.role == 'user' or not loop.first -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\n\n</think>\n\n' }}
{%- endif -%}
{%- endif -%}
"""

# Llama 3: the template writes BOS, trims contents, and always has a system header of its own.
LLAMA3 = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set lead = messages[0].content | trim -%}{%- set rest = messages[1:] -%}
{%- else -%}
{%- set lead = '' -%}{%- set rest = messages -%}
{%- endif -%}
{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' + lead }}
{{- '<|eot_id|>' }}
{%- for message in rest -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{{- (message.content | trim) + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""

# Llama 2: role markers are plain text; strict alternation; only a leading system message.
LLAMA2 = """
{%- if messages[0].role == 'system' -%}
{%- set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}
{%- set rest = messages[1:] -%}
{%- else -%}
{%- set lead = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if message.role == 'user' -%}
{{ bos_token + '[INST] ' + (lead if loop.first else '') + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' -%}
{{ ' ' + message.content + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

# Mistral: markers are tokens; strict alternation; the system text goes into the last user turn.
MISTRAL = """
{%- if messages[0].role == 'system' -%}
{%- set lead = messages[0].content -%}{%- set rest = messages[1:] -%}
{%- else -%}
{%- set lead = '' -%}{%- set rest = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in rest -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('After the optional system message, conversation roles must alternate') }}
{%- endif -%}
{%- if message.role == 'user' -%}
{{ '[INST] ' + (lead + '\n\n' if lead and loop.last else '') + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' -%}
{{ ' ' + message.content + eos_token }}
{%- else -%}
{{ raise_exception('Only user and assistant roles are supported') }}
{%- endif -%}
{%- endfor -%}
"""

# Gemma: no system role, the assistant is "model".
GEMMA = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{ raise_exception('System role not supported') }}
{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\n' + (message.content | trim) + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

# Some early ones: a system message vanishes without a word, markers are plain words.
SILENT = """
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ '### Human: ' + message.content + '\n' }}{%- endif -%}
{%- if message.role == 'assistant' -%}
{{ '### Assistant: ' + message.content + eos_token + '\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Assistant:' }}{%- endif -%}
"""

# Vicuna: a default text without any header.
VICUNA = """
{%- if messages[0].role == 'system' -%}
{%- set lead = messages[0].content -%}{%- set rest = messages[1:] -%}
{%- else -%}
{%- set lead = 'A chat between a curious user and a polite assistant.' -%}
{%- set rest = messages -%}
{%- endif -%}
{{- bos_token + lead -}}
{%- for message in rest -%}
{%- if message.role == 'user' -%}{{ ' USER: ' + message.content }}
{%- elif message.role == 'assistant' -%}{{ ' ASSISTANT: ' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""

# name: template, special tokens (the first is BOS, the second EOS), added tokens, adds BOS itself
FAMILIES: dict[str, tuple[str, list[str], list[str], bool]] = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], [], False),
    "qwen": (
        QWEN,
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
         "</tool_response>"],
        False,
    ),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        [],
        True,
    ),
    "llama2": (LLAMA2, ["<s>", "</s>"], [], True),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], [], True),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n"], True),
    "silent": (SILENT, ["<s>", "</s>"], [], True),
    "vicuna": (VICUNA, ["<s>", "</s>"], [], True),
}  # fmt: skip


def family_tokenizer(name: str, **changes: Any) -> PreTrainedTokenizerFast:
    """Return a fresh tokenizer of a family; `changes` go to its constructor."""
    template, special, added, adds_bos = FAMILIES[name]
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    bos, eos = special[:2]
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    options = {
        "bos_token": bos,
        "eos_token": eos,
        "additional_special_tokens": special[2:],
        "chat_template": template,
    }
    build: Any = PreTrainedTokenizerFast  # untyped in Transformers
    tokenizer: PreTrainedTokenizerFast = build(tokenizer_object=backend, **{**options, **changes})
    return tokenizer
