"""The files beside the weights: tokenizer, chat template, special tokens, generation settings."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import ASSISTANT, BOS, EOS, PAD, USER, load_tokenizer
from dsv3_ref.data.tokenizer_settings import (
    SETTINGS_FILES,
    TokenizerSettings,
    copy_files,
    load_tokenizer_settings,
)

TOKENIZER = "tokenizer.json"
COPIED = (  # what other programs read beside the weights
    TOKENIZER, "added_tokens.json", "tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt",
    *SETTINGS_FILES,
)  # fmt: skip
OWN_TOKENS = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
# The form of `render_conversation` (chapter 14): a system text, then user and assistant in turn.
CHAT_TEMPLATE = (
    "{%- set turn = namespace(number=0) -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] == 'system' -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- if message['role'] != ('user', 'assistant')[turn.number % 2] -%}"
    "{{- raise_exception('user and assistant alternate, the user begins') -}}"
    "{%- endif -%}"
    "{%- set turn.number = turn.number + 1 -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '" + USER + "' + message['content'] -}}"
    "{%- else -%}"
    "{{- '" + ASSISTANT + "' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and turn.number % 2 -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the files of a Hugging Face directory that stand beside its weights and config.json.

    Python files that its settings name are copied, too; they are not executed.
    """
    code = sorted(path.name for path in source.glob("*.py"))
    copy_files(source, target, [*COPIED, *code])


def write_own_files(source: Path, target: Path, max_seq_len: int) -> dict[str, int]:
    """Write the files for the tokenizer of a run; return the ids that belong to config.json.

    A run that began with another model keeps that model's files, which are copied.
    """
    if not (source / TOKENIZER).is_file():
        raise UserError(f"{source} has no {TOKENIZER}: name a directory that has one with --like")
    tokenizer, settings = load_tokenizer(source), load_tokenizer_settings(source)
    ids = special_token_ids(tokenizer, settings)
    if settings.special_tokens:
        copy_tokenizer_files(source, target)
        return ids
    own_tokenizer(tokenizer).save(str(target / TOKENIZER))
    write_object(target / "special_tokens_map.json", OWN_TOKENS)
    write_object(target / "generation_config.json", ids)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    write_object(target / "tokenizer_config.json", OWN_TOKENS | config)
    return ids


def special_token_ids(tokenizer: Tokenizer, settings: TokenizerSettings) -> dict[str, int]:
    """Return `bos_token_id`, `eos_token_id` and `pad_token_id`, those that there are."""
    texts = settings.special_tokens or OWN_TOKENS
    ids = {name: tokenizer.token_to_id(texts[name]) for name in OWN_TOKENS if name in texts}
    return {f"{name}_id": i for name, i in ids.items() if i is not None}


def exported_chat_template(settings: TokenizerSettings) -> str | None:
    """Return the chat template of a directory; of a run of ours, that of V3's own form."""
    if settings.special_tokens:
        return settings.chat_templates.get("default")
    return CHAT_TEMPLATE


def own_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that puts the begin token before each text, as `dsv3 generate` does."""
    bos = tokenizer.token_to_id(BOS)
    if bos is None:
        raise UserError(f"the tokenizer lacks {BOS}")
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, bos)]
    )
    return copy


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as other programs lay it out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
