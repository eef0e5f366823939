"""Run files: the options of a command as YAML or JSON, and the record of a run that repeats it."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

import dsv3_ref
from dsv3_ref.checkpoints.atomic import describe_json
from dsv3_ref.config import Config, UserError, suggest

RUN_FILE_SUFFIXES = (".yaml", ".yml", ".json")
MAX_RUN_FILE = 1 << 20  # characters; PyYAML reads a megabyte in seconds

# ── The record of a run ──


def describe_run(name: str, settings: Any, command: str | None) -> dict[str, Any]:
    """Return what suffices to repeat a command: its options, and the program that runs it.

    settings: the dataclass of its options.
    """
    commit, dirty = git_state()
    return {
        "command": command,
        "name": name,
        "version": dsv3_ref.__version__,
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
    }


def git_state() -> tuple[str | None, bool | None]:
    """Return the commit of this checkout and whether files differ from it; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    commit = run_git(root, "rev-parse", "HEAD")
    status = run_git(root, "status", "--porcelain", "--untracked-files=no")
    return commit or None, None if status is None else bool(status)


def run_git(root: Path, *words: str) -> str | None:
    """Return the output of a git command; None without git or if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, encoding="utf-8", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ── Reading ──


@dataclass(frozen=True)
class RunFile:
    """Options by name, from a file."""

    path: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, options: type) -> Any:
        """Return the value of an option as its type; None if the file does not have it."""
        if name not in self.values:
            return None
        return convert(self.values[name], get_type_hints(options)[name], f"{self.path}: {name}")

    def apply(self, default: Any) -> Any:
        """Return a dataclass of options with the values of the file."""
        return apply_options(default, self.values, str(self.path))


def split_run_file(argv: list[str], name: str, options: type) -> tuple[list[str], RunFile]:
    """Split `--config FILE` off the command line of a command; return the rest, and the file.

    If there is none, or --config names the shape of a model, return the whole command line.
    """
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag != "--config":
            continue
        width = 1 if equals else 2
        path = Path(value if equals else "".join(argv[i + 1 : i + 2]))
        values = read_run_file(path, name, options)
        if values is not None:
            return argv[:i] + argv[i + width :], RunFile(path, values)
    return argv, RunFile()


def read_run_file(path: Path, name: str, options: type) -> dict[str, Any] | None:
    """Return the options in a run file; None if it names or holds the shape of a model.

    A file holds options by name, or the record of a run. Raise a `UserError` if it has neither.
    """
    has_config = "config" in field_names(options)
    if has_config and not (path.suffix.lower() in RUN_FILE_SUFFIXES and path.is_file()):
        return None
    values = read_mapping(path)
    if has_config and set(values) <= field_names(Config):
        return None
    record = values.get("run", values)
    if isinstance(record, dict) and isinstance(record.get("settings"), dict):
        if record.get("name") != name:
            raise UserError(
                f"{path} records another command than dsv3 {name}: "
                f"dsv3 {record.get('name')} --config {path} repeats it"
            )
        values = record["settings"]
    values = normalize(values, path)
    if "recipe" in field_names(options):
        values = nest(values, "recipe", get_type_hints(options)["recipe"], path)
    return values


class RunFileLoader(yaml.SafeLoader):
    """A loader of YAML without aliases: a few lines of them stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node; raise an error for an alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"write the value again in the place of *{event.anchor}",
                event.start_mark,
            )  # fmt: skip
        return super().compose_node(parent, index)


def read_mapping(path: Path) -> dict[Any, Any]:
    """Return the mapping in a YAML or JSON file."""
    is_json = path.suffix.lower() == ".json"
    if path.is_fifo() and not str(path).startswith("/dev/"):  # there, a shell's <(…) writes at once
        raise UserError(f"--config {path} is a named pipe, which may wait forever: give a run file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_RUN_FILE + 1)  # a pipe has no size, and a device no end
        if len(text) > MAX_RUN_FILE:
            raise ValueError(f"it has more than {MAX_RUN_FILE} characters")
        values = json.loads(text or "null") if is_json else RunFileLoader(text).get_single_data()
    except OSError as e:
        raise UserError(f"--config {path} cannot be read: {e.strerror}; give a run file") from None
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path} is not {'JSON' if is_json else 'YAML'}: {reason}") from None
    if values is None:
        raise UserError(f"{path} has no options: write one per line, such as seed: 1")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold options by name, not {describe_json(values)}")
    return values


def normalize(values: Mapping[Any, Any], path: Path | str) -> dict[str, Any]:
    """Return options with underscores in their names, and `model.dim` as a mapping in `model`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{path}: the name of an option must be a string, not {key!r}")
        first, dot, rest = key.removeprefix("--").replace("-", "_").partition(".")
        mapping = result.get(first)
        if dot:
            value = (mapping if isinstance(mapping, dict) else {}) | {rest: value}
        result[first] = value
    return result


def nest(values: dict[str, Any], name: str, options: type, path: Path) -> dict[str, Any]:
    """Move the options of a nested dataclass without a prefix, such as `lr`, into its mapping."""
    inner = values.get(name, {})
    if not isinstance(inner, dict):
        raise UserError(f"{path}: {name} must be a mapping of options, not {quote_value(inner)}")
    own = {key: value for key, value in values.items() if key in field_names(options)}
    rest = {key: value for key, value in values.items() if key not in own}
    return rest | ({name: inner | own} if inner or own else {})


# ── Options ──


def field_names(options: Any) -> set[str]:
    """Return the names of the fields of a dataclass or a named tuple."""
    return {x.name for x in fields(options)} if is_dataclass(options) else set(options._fields)


def is_group(kind: Any) -> bool:
    """Return whether a type of option is itself options: a dataclass or a named tuple."""
    return is_dataclass(kind) or hasattr(kind, "_fields")


def apply_options(default: Any, values: Mapping[str, Any], source: str) -> Any:
    """Return a dataclass of options with other values, nested ones as mappings.

    Raise a `UserError` that names the first wrong key. source: the file and, if the options are
    nested, their name in it, for errors.
    """
    hints, names = get_type_hints(type(default)), field_names(type(default))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            hint = suggest(name, flat_names(type(default)))
            raise UserError(f"{source}: there is no option {name!r}{hint}: see --help")
        if not is_group(hints[name]):
            changes[name] = convert(value, hints[name], f"{source}: {name}")
        elif isinstance(value, dict):
            inner = normalize(value, source)
            # options of the recipe stand at the top of a file, as on the command line
            place = source if name == "recipe" else f"{source}: {name}"
            changes[name] = apply_options(getattr(default, name), inner, place)
        else:
            raise UserError(
                f"{source}: {name} must be a mapping of options, not {quote_value(value)}"
            )
    is_tuple = hasattr(default, "_replace")
    return default._replace(**changes) if is_tuple else replace(default, **changes)


def flat_names(options: Any) -> list[str]:
    """Return the names of the options of a dataclass or a named tuple, and of those in it."""
    hints = get_type_hints(options)
    names = sorted(field_names(options))
    for name in names.copy():
        names += flat_names(hints[name]) if is_group(hints[name]) else []
    return names


def convert(value: Any, kind: Any, key: str) -> Any:
    """Return a value of YAML or JSON as the type of an option, or raise a `UserError`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        return convert(value, next(x for x in parts if x is not NoneType), key)
    if origin is Literal:
        if value not in parts:
            choices = ", ".join(map(str, parts))
            raise UserError(f"{key} must be one of {choices}, not {quote_value(value)}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(convert(item, parts[0], key) for item in items)
    return convert_scalar(value, kind, key)


def convert_scalar(value: Any, kind: type, key: str) -> Any:
    """Return a value as a string, number, boolean or path, or raise a `UserError`."""
    expected = {
        bool: "true or false", int: "a whole number", float: "a number",
        str: "a string (quote it)", Path: "a path, as a string",
    }[kind]  # fmt: skip
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        with suppress(ValueError):
            return float(value)
    if kind is float and is_number:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(os.path.expanduser(value))
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise UserError(f"{key} must be {expected}, not {quote_value(value)}")


def quote_value(value: Any) -> str:
    """Return a value of a run file as messages show it."""
    return "an empty value" if value is None else repr(value)
