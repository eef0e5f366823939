"""The files beside the weights: tokenizer, chat template, special tokens, generation settings."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from dsv3_ref.checkpoints.atomic import read_json
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import ASSISTANT, BOS, EOS, PAD, USER, load_tokenizer

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
COPIED = (  # what other programs read beside the weights
    TOKENIZER, SETTINGS, "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "tokenizer.model",
    "tiktoken.model", "vocab.json", "merges.txt",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a folder
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
    for name in [*COPIED, *code]:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)


def write_own_files(source: Path, target: Path, max_seq_len: int) -> dict[str, Any]:
    """Write the files for the tokenizer of a run; return the ids that belong to config.json.

    A run that began with another model keeps that model's files, which are copied.
    """
    if not (source / TOKENIZER).is_file():
        raise UserError(f"{source} has no {TOKENIZER}: name a directory that has one with --like")
    tokenizer = load_tokenizer(source)
    if (source / SETTINGS).is_file():
        copy_tokenizer_files(source, target)
        return special_token_ids(tokenizer, read_json(source / SETTINGS))
    own = own_tokenizer(tokenizer)
    own.save(str(target / TOKENIZER))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in names.items()}
    write_object(target / "special_tokens_map.json", names)
    write_object(target / "generation_config.json", ids)
    write_object(
        target / SETTINGS,
        names
        | {
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq_len,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return ids


def special_token_ids(tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, int]:
    """Return `bos_token_id` and so on for the special tokens of a tokenizer_config.json."""
    ids = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value  # an AddedToken
        token_id = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if token_id is not None:
            ids[f"{name}_id"] = token_id
    return ids


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
