"""Small tokenizers with chat templates that behave as the real families' do.

Each is a byte-level BPE without merges, so every text is encodable and one id is one byte. The
templates are written for these tests; what they copy is the behaviour, not the text, of the real
ones: which roles they take, what they insert, what they raise and which markers are tokens.
"""

# ruff: noqa: E501 - a line break would be one in the template

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

# Mistral v0.3: the system text goes into the last message, if that is a user's; ids of nine letters.
MISTRAL3 = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}{%- set content = message.content %}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

# Llama 3.1: one call in a message, and only the call of it; results in a turn of their own role.
LLAMA31 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- if tools %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nRespond in the format {"name": function name, ' }}
    {{- '"parameters": dictionary of argument name and its value}.' }}
    {%- for t in tools %}{{- t | tojson(indent=4) + "\n\n" }}{%- endfor %}
    {{- first + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' + (tool_call.arguments | tojson) + "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

# DeepSeek R1: arguments are text; the last system message counts; thinking is cut and opened.
DEEPSEEK = """
{%- if not add_generation_prompt is defined -%}{%- set add_generation_prompt = false -%}{%- endif -%}
{%- set ns = namespace(is_first=false, is_tool=false, system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] -%}{%- endif -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set ns.is_tool = false -%}{{ '<|User|>' + message['content'] }}
{%- endif -%}
{%- if message['role'] == 'assistant' and 'tool_calls' in message -%}
{%- set ns.is_tool = false -%}
{{ '<|Assistant|><|calls|>' }}
{%- for tool in message['tool_calls'] -%}
{{ '<|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\n```json\n' }}
{{- tool['function']['arguments'] + '\n```<|endcall|>' }}
{%- endfor -%}
{{ '<|endcalls|>' + eos_token }}
{%- elif message['role'] == 'assistant' -%}
{%- set content = message['content'] -%}
{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
{{ '<|Assistant|>' + content + eos_token }}
{%- endif -%}
{%- if message['role'] == 'tool' -%}
{{ '<|output|>' + message['content'] + '<|endoutput|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\n' }}{%- endif -%}
"""

# LLaVA and others that see pictures: contents are lists of parts, of the assistant's too.
PARTS = """
{%- for message in messages -%}
{{ message['role'] | upper + ': ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
{{ part['text'] + ' ' }}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

# Only users' contents are lists of parts; no system role, and a late one is refused.
USER_PARTS = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|user|>{% for p in message.content %}{{ p.text }}{% endfor %}<|end|>
{%- elif message.role == 'assistant' -%}<|assistant|>{{ message.content }}<|end|>
{%- else -%}{{ raise_exception('Unknown role ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""

# Phi-3: whatever role; nothing is checked. StableLM, Zephyr and others look alike.
PHI3 = """
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}
"""

# Command-R: strict alternation by turn, a late system turn raises.
COMMAND = """
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{%- set loop_messages = messages[1:] -%}{%- set system_message = messages[0]['content'] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- set system_message = false -%}{%- endif -%}
{%- if system_message != false -%}
{{ '<|TURN|><|SYSTEM|>' + system_message + '<|END|>' }}
{%- endif -%}
{%- for message in loop_messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'user' -%}{{ '<|TURN|><|USER|>' + content.strip() + '<|END|>' }}
{%- elif message['role'] == 'assistant' -%}
{{ '<|TURN|><|CHATBOT|>'  + content.strip() + '<|END|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|TURN|><|CHATBOT|>' }}{%- endif -%}
"""

# gpt-oss: the system text is a developer's turn; results are named after the call before them.
GPT_OSS = """
{{- '<|start|>system<|message|>You are ChatGPT.<|end|>' }}
{%- if messages[0].role == 'system' or messages[0].role == 'developer' %}
{%- set developer = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set developer = '' %}{%- set rest = messages %}{%- endif %}
{%- if developer %}
{{- '<|start|>developer<|message|># Instructions\n\n' + developer + '\n\n<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in rest %}
{%- if message.role == 'assistant' %}
{%- if 'tool_calls' in message %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- (call.arguments | tojson) + '<|call|>' }}{%- set last.name = call.name %}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- elif message.role == 'tool' %}
{%- if last.name is none %}
{{- raise_exception('Message has tool role, but there was no previous assistant message with a tool call!') }}
{%- endif %}
{{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- (message.content | tojson) + '<|end|>' }}
{%- elif message.role == 'user' %}
{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
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
    "mistral3": (
        MISTRAL3,
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
         "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
        [],
        True,
    ),
    "llama31": (
        LLAMA31,
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        [],
        True,
    ),
    "deepseek": (
        DEEPSEEK,
        ["<s>", "</s>"],
        ["<|User|>", "<|Assistant|>", "<think>", "</think>", "<|calls|>", "<|call|>", "<|sep|>",
         "<|endcall|>", "<|endcalls|>", "<|output|>", "<|endoutput|>"],
        True,
    ),
    "parts": (PARTS, ["<s>", "</s>"], [], True),
    "user_parts": (USER_PARTS, ["<s>", "</s>"], ["<|user|>", "<|assistant|>", "<|end|>"], True),
    "phi3": (
        PHI3, ["<s>", "</s>"], ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], True,
    ),
    "command": (
        COMMAND,
        ["<s>", "<|END|>", "<|TURN|>", "<|SYSTEM|>", "<|USER|>", "<|CHATBOT|>"],
        [],
        True,
    ),
    "gpt_oss": (
        GPT_OSS,
        ["<s>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|call|>"],
        [],
        False,
    ),
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
