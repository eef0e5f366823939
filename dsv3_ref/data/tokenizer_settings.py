"""The files beside a tokenizer.json: special tokens, chat templates, stop tokens, sampling."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_ref.checkpoints.atomic import clear_path, describe_json, read_text
from dsv3_ref.config import UserError

# Files of a tokenizer, which a run copies from the model that it starts from.
SETTINGS_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
SPECIAL_TOKEN_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
SAMPLING_RANGES = {  # of the settings of generation_config.json that are honored; top_k −1, 0: off
    "temperature": (1e-6, 100), "top_p": (1e-6, 1), "top_k": (-1, 1 << 30), "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerSettings:
    """The contents of the files beside a tokenizer.json; empty for tokenizers of our own runs."""

    special_tokens: dict[str, str] = field(default_factory=dict)  # "bos_token" → its text
    chat_templates: dict[str, str] = field(default_factory=dict)  # "default" → Jinja source
    stop_token_ids: frozenset[int] = frozenset()  # `eos_token_id` of the generation settings
    add_bos_token: bool | None = None  # before a plain text; None: not said
    sampling: dict[str, float] = field(default_factory=dict)  # defaults: SAMPLING_RANGES' names
    source: str = "this model"  # the directory, for messages


def load_tokenizer_settings(directory: Path) -> TokenizerSettings:
    """Read the settings of a directory; files that are missing say nothing."""
    config = read_object(directory / "tokenizer_config.json")
    generation = read_object(directory / "generation_config.json")
    stops = generation.get("eos_token_id")
    if stops is None:
        stops = read_object(directory / "config.json").get("eos_token_id")
    add_bos_token = config.get("add_bos_token")
    return TokenizerSettings(
        special_tokens=read_special_tokens(directory, config),
        chat_templates=read_chat_templates(directory, config),
        stop_token_ids=frozenset(parse_token_ids(directory, stops)),
        add_bos_token=add_bos_token if isinstance(add_bos_token, bool) else None,
        sampling=parse_sampling(directory, generation),
        source=str(directory),
    )


def copy_tokenizer_settings(source: Path, target: Path) -> None:
    """Copy the files beside a tokenizer.json to a run, so that it keeps form and stop tokens."""
    if source.resolve() == target.resolve() or not source.is_dir():
        return
    copy_files(source, target, SETTINGS_FILES)
    stops = load_tokenizer_settings(source).stop_token_ids
    path = target / "generation_config.json"
    if stops and not path.exists():  # those of config.json
        text = json.dumps({"eos_token_id": sorted(stops)})
        clear_path(path).write_text(text, encoding="utf-8")


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the files of these names that a directory has, and its chat templates with names.

    Raise a `UserError` for a link that leads out of the directory: what a stranger's link points
    to must not end up in what a user publishes.
    """
    paths = [path for path in (source / name for name in names) if path.is_file()]
    for path in [*paths, *named_templates(source)]:
        if leads_outside(path, source):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside of the model: replace it by that "
                "file if you trust the link"
            )
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, clear_path(copy))


def leads_outside(path: Path, folder: Path) -> bool:
    """Return whether a path is a link out of a folder; the hub's cache links into its own blobs."""
    real, home = path.resolve(), folder.resolve()
    if home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs":
        return False
    return not real.is_relative_to(home)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is no such file; raise a `UserError` if not."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({e}): download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold an object of fields, not {describe_json(values)}")
    return values


def read_special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the texts of special tokens by their names, such as "bos_token"."""
    by_map = read_object(directory / "special_tokens_map.json")
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name, by_map.get(name))
        text = value.get("content") if isinstance(value, dict) else value  # an AddedToken
        if isinstance(text, str) and text:
            tokens[name] = text
        elif value is not None and value != "":
            raise UserError(
                f"{name} of {directory / 'tokenizer_config.json'} is neither a string nor an "
                'object with its "content": correct it'
            )
    return tokens


def named_templates(directory: Path) -> list[Path]:
    """Return the files of the chat templates that have names."""
    paths = (directory / NAMED_TEMPLATES).glob("*.jinja")
    return sorted(path for path in paths if path.is_file())


def read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates of a directory by name; files come before tokenizer_config.json."""
    main = directory / "chat_template.jinja"
    named = named_templates(directory)
    if main.is_file() or named:
        files = {"default": main} if main.is_file() else {}
        files |= {path.stem: path for path in named}
        return {name: read_text(path) for name, path in files.items()}
    value = config.get("chat_template")
    if value is None:
        value = read_object(directory / "chat_template.json").get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        pairs = [(x.get("name"), x.get("template")) for x in value if isinstance(x, dict)]
        templates = {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}
        if len(templates) == len(value) > 0:
            return templates
    raise UserError(
        f"chat_template of {directory / 'tokenizer_config.json'} is neither a string nor a list of "
        '{"name", "template"}: correct it'
    )


def parse_token_ids(directory: Path, value: object) -> Iterable[int]:
    """Return the token ids of `eos_token_id`: a number, a list of them, or None."""
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"eos_token_id in {directory} is {value!r}: write a token id or a list")
    return ids


def parse_sampling(directory: Path, generation: dict[str, Any]) -> dict[str, float]:
    """Return the sampling settings of generation_config.json; {} if it turns sampling off.

    Raises a `UserError` for a value that is out of range.
    """
    if generation.get("do_sample") is False:
        return {}
    values = {k: generation[k] for k in SAMPLING_RANGES if generation.get(k) is not None}
    for name, value in values.items():
        low, high = SAMPLING_RANGES[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (name == "top_k" and value != int(value)):
            raise UserError(
                f"{name} of {directory / 'generation_config.json'} is {value!r}: correct it"
            )
    return values
