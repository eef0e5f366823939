"""Chat templates of the forms that the family's models bring, written for the tests, and marks."""

import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from dsv3_ref.data.tokenizer import new_tokenizer, save_tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


class ChatForm(NamedTuple):
    """A model's chat template and the tokens that it is written with."""

    template: str
    special: tuple[str, ...] = (BOS, EOS)
    added: tuple[str, ...] = (USER, ASSISTANT)  # with `special: false`
    bos: str | None = BOS
    eos: str = EOS
    has_system: bool = True


LOOP = "{% for message in messages %}"
END = "{% endfor %}"
SYSTEM_FIRST = """{% set ns = namespace(system='', first=true) %}
{%- for message in messages %}{% if message['role'] == 'system' %}
{%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] %}
{%- set ns.first = false %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"""
SAID_AND_ANSWERED = """{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
V31 = (
    SYSTEM_FIRST
    + """{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ '<｜Assistant｜></think>' }}
{%- set content = message['content'] -%}
{%- if '</think>' in content %}{% set content = content.split('</think>', 1)[1] %}{% endif %}
{{- content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}"""
)
R1 = (
    SYSTEM_FIRST
    + """{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
)
V2 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}
{%- endif %}{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}
{%- elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
MOONLIGHT = """{%- for message in messages -%}
{%- if loop.first and messages[0]['role'] != 'system' -%}
{{ '<|im_system|>system<|im_middle|>You are helpful<|im_end|>' }}{%- endif -%}
{%- if message['role'] == 'system' -%}{{ '<|im_system|>' }}
{%- elif message['role'] == 'user' -%}{{ '<|im_user|>' }}
{%- elif message['role'] == 'assistant' -%}{{ '<|im_assistant|>' }}{%- endif -%}
{{ message['role'] }}{{ '<|im_middle|>' }}{{ message['content'] + '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}"""
KIMI = """{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for message in messages -%}
{%- set name = message.get('name') or message['role'] -%}
{%- if message['role'] == 'user' -%}<|im_user|>{{ name }}<|im_middle|>
{%- elif message['role'] == 'assistant' -%}<|im_assistant|>{{ name }}<|im_middle|>
{%- else -%}<|im_system|>{{ name }}<|im_middle|>{%- endif -%}
{%- if message['role'] == 'assistant' and message.get('tool_calls') -%}
{{ text(message.get('content')) }}<|tool_calls_section_begin|>
{%- for call in message['tool_calls'] -%}
<|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
{%- if call['function']['arguments'] is string -%}{{ call['function']['arguments'] }}
{%- else -%}{{ call['function']['arguments'] | tojson }}{%- endif -%}<|tool_call_end|>
{%- endfor -%}<|tool_calls_section_end|>
{%- elif message['role'] == 'tool' -%}## Return of {{ message.tool_call_id }}
{{ text(message.content) }}
{%- else -%}{{ text(message['content']) }}{%- endif -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""
CHATML_TRIMMED = """{{ bos_token }}{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
GIGA = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' and not loop.first and messages[loop.index0 - 1].role == 'user' %}
{{- raise_exception('two user turns in a row') }}{% endif %}
{%- if message.reasoning_content is defined %}
{{- '<think>' + message.reasoning_content | trim + '</think>' }}{% endif %}
{{- message.role + '<|role_sep|>\\n' + (message.content or '') + '<|message_sep|>\\n\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant<|role_sep|>\\n' }}{% endif %}"""
THINK = ("<think>", "</think>")
MOON = ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>")
TOOLS = (
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
FORMS = {
    "V3": ChatForm(SYSTEM_FIRST + SAID_AND_ANSWERED),
    "V3.1": ChatForm(V31, added=(USER, ASSISTANT, *THINK)),
    "R1": ChatForm(R1, added=(USER, ASSISTANT, *THINK)),
    "V2-Lite": ChatForm(V2, added=()),
    "V2.5": ChatForm(SYSTEM_FIRST + SAID_AND_ANSWERED, (BOS, EOS, USER, ASSISTANT), ()),
    "Moonlight": ChatForm(MOONLIGHT, ("[BOS]", "[EOS]", *MOON), (), "[BOS]", "<|im_end|>"),
    "Kimi-K2": ChatForm(KIMI, ("[BOS]", "[EOS]", *MOON), TOOLS, "[BOS]", "[EOS]"),
    "GigaChat3": ChatForm(
        GIGA, ("<s>", "</s>", "<|role_sep|>", "<|message_sep|>"), THINK, "<s>", "<|message_sep|>"
    ),
    "trimmed": ChatForm(
        CHATML_TRIMMED, ("<|begin|>",), ("<|im_start|>", "<|im_end|>"), "<|begin|>", "<|im_end|>"
    ),
}  # fmt: skip
TEXT = "User: Assistant: system user assistant think a fine day, hello world 12\n\n" * 20


def form_tokenizer(form: ChatForm) -> Tokenizer:
    """Return a byte-level tokenizer with the marks of a form."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer = new_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in form.special])
    tokenizer.add_tokens([AddedToken(s, normalized=True, special=False) for s in form.added])
    return tokenizer


def write_form(folder: Path, form: ChatForm, **config: object) -> Path:
    """Write tokenizer.json and tokenizer_config.json of a form."""
    save_tokenizer(form_tokenizer(form), folder / "tokenizer.json")
    values = {
        "bos_token": {"__type": "AddedToken", "content": form.bos}, "eos_token": form.eos,
        "chat_template": form.template, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config))
    return folder
