"""`dsv3 COMMAND …`: find the command, parse its options from their dataclass, run it."""

import os
import shlex
from dataclasses import fields
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from dsv3_ref.cli import environment
from dsv3_ref.cli.commands import BY_NAME, COMMANDS
from dsv3_ref.config import UserError


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code; without `argv`, run that of the command line.

    The console script calls it without `argv`: then the process ends with the exit code.
    """
    if argv is not None:
        return run(argv)
    code = environment.run_as_process(run)
    exit_now(code)
    return code


def run(argv: list[str]) -> int:
    """Run a command and return its exit code.

    A user's mistake, an error of the operating system and a lack of memory are one sentence and
    exit code 2. If the reader of a pipe has left, nothing is printed and the code is 141.
    """
    name, options = split_command(argv)
    try:
        if name not in BY_NAME:
            return print_overview(argv)
        run_command(name, options)
    except BrokenPipeError:
        return environment.BROKEN_PIPE
    except (UserError, OSError) as e:
        environment.report(str(e))
        return 2
    except UnicodeEncodeError as e:
        bad = ascii(e.object[e.start : e.end])
        environment.report(f"a text or the name of a file has bytes that are not UTF-8 ({bad})")
        return 2
    except (MemoryError, RuntimeError, ImportError) as e:
        if not environment.is_out_of_memory(e):
            raise
        reason = str(e).strip().splitlines()
        environment.report(
            f"not enough memory{f' ({reason[-1]})' if reason else ''}: choose a smaller model, "
            "batch or sequence length, or raise the limit"
        )
        return 2
    except SystemExit as e:  # --help, or tyro has printed what is wrong
        return e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def split_command(argv: list[str]) -> tuple[str, list[str]]:
    """Split ["data", "bench", "x"] into "data bench" and ["x"]: names have one or two words."""
    two_words = " ".join(argv[:2])
    if two_words in BY_NAME:
        return two_words, argv[2:]
    return " ".join(argv[:1]), argv[1:]


# ── Running a command ──


def run_command(name: str, argv: list[str]) -> None:
    """Parse the options of a command and call what runs it."""
    command, command_line = BY_NAME[name], shlex.join(["dsv3", *name.split(), *argv])
    if command.task:
        train(name, argv, command_line)
        return
    import tyro

    from dsv3_ref.cli.option_groups import OPTION_GROUPS, grouping_registry
    from dsv3_ref.training.run_file import describe_run, field_names, split_run_file

    options = load(command.options)
    argv = join_repeated_options(expand_home(argv, options), options)
    registry = grouping_registry({options: OPTION_GROUPS[name]})
    argv, file = split_run_file(argv, name, options)
    default: dict[str, Any] = {}
    if file.values:
        required = {x: tyro.MISSING for x in field_names(options) if not hasattr(options, x)}
        default["default"] = file.apply(options(**required))
    args = tyro.cli(options, prog=f"dsv3 {name}", args=argv, registry=registry, **default)
    function = load(command.function)
    if command.stores_record:
        function(args, describe_run(name, args, command_line))
    else:
        function(args)


def train(name: str, argv: list[str], command_line: str) -> None:
    """Run a training task in this process or, under a launcher, as one of several ranks."""
    from dsv3_ref.cli.option_groups import OPTION_GROUPS, RECIPE, grouping_registry
    from dsv3_ref.optim import TrainingRecipe
    from dsv3_ref.training.settings import parse_args, world_size

    command = BY_NAME[name]
    options = load(command.options)
    registry = grouping_registry({options: OPTION_GROUPS[name], TrainingRecipe: RECIPE})
    argv = join_repeated_options(expand_home(argv, options), options)
    config = parse_args(argv, options, registry)
    if world_size() > 1:
        run_task = load("dsv3_ref.parallel.launch.run_on_ranks")
    else:
        run_task = load("dsv3_ref.training.loop.run_in_process")  # takes seconds to import
    run_task(load(command.task)(config), command_line)


# ── Options that are given more than once ──


def join_repeated_options(argv: list[str], options: type) -> list[str]:
    """Join the values of each repeated option of several values where it stands last.

    `--data A --lr 1 --data B` becomes `--lr 1 --data A B`: by itself, tyro takes only the last
    one's values. Raise a `UserError` if an option of one value is repeated, unless it is the same
    flag again, as in `--resume --resume`.
    """
    groups = split_options(argv)
    several = set(map(flag_of, fields_of_several_values(options)))
    last: dict[str, int] = {}
    for i, (flag, tokens) in enumerate(groups):
        if flag in last:
            before = groups[last[flag]][1]
            if flag in several:
                groups[i] = flag, [*before, *values_of(tokens)]
            elif tokens != before or values_of(tokens):
                raise UserError(f"{flag} is given twice: give it once, since it has one value")
            groups[last[flag]] = flag, []
        if flag:
            last[flag] = i
    return list(chain.from_iterable(tokens for _, tokens in groups))


def expand_home(argv: list[str], options: type) -> list[str]:
    """Replace ~ by the home directory in options that are paths: shells leave it in --out=~/run."""
    hints = get_type_hints(options)
    paths = {flag_of(name) for name, hint in hints.items() if Path in (hint, *get_args(hint))}
    expanded: list[str] = []
    for flag, tokens in split_options(argv):
        expanded += map(expand_value, tokens) if flag in paths else tokens
    return expanded


def expand_value(token: str) -> str:
    """Replace ~ in a value or in `--x=value`."""
    name, equals, value = token.partition("=")
    if equals and token.startswith("--"):
        return f"{name}={os.path.expanduser(value)}"
    return os.path.expanduser(token)


def flag_of(name: str) -> str:
    """Return the flag of a field: `top_p` → `--top-p`."""
    return f"--{name.replace('_', '-')}"


def split_options(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Split a command line before every option: (flag, its token and the values after it).

    The flag of `--x_y=1` and of `--no-x-y` is `--x-y`; that of the tokens before the first option,
    and of those after `--`, is empty.
    """
    groups: list[tuple[str, list[str]]] = [("", [])]
    for i, token in enumerate(argv):
        if token == "--":
            groups.append(("", argv[i:]))
            break
        if token.startswith("--") and token[2:3].isalpha():
            name = token[2:].partition("=")[0].replace("_", "-").removeprefix("no-")
            groups.append((f"--{name}", [token]))
        else:
            groups[-1][1].append(token)
    return groups


def values_of(tokens: list[str]) -> list[str]:
    """Return the values of an option: `--x=1 2` → 1 and 2."""
    _, equals, value = tokens[0].partition("=")
    return [value, *tokens[1:]] if equals else tokens[1:]


def fields_of_several_values(options: type) -> set[str]:
    """Return the names of the fields of a dataclass of options that are tuples."""
    return {x.name for x in fields(options) if get_origin(get_type_hints(options)[x.name]) is tuple}


def load(place: str) -> Any:
    """Import `package.module.name` and return what it names."""
    return resolve_name(place)


# ── What there is ──


def print_overview(argv: list[str]) -> int:
    """Print the version, a completion script, or the commands (all, or those of a group).

    Return the exit code.
    """
    if argv == ["--version"]:
        print(describe_version())
        return 0
    if argv[:1] == ["--print-completion"]:
        from dsv3_ref.cli.completion import completion_script

        print(completion_script(" ".join(argv[1:])))
        return 0
    word = argv[0] if argv else ""
    prefix = f"{word} " if any(name.startswith(f"{word} ") for name in BY_NAME) else ""
    rest = argv[1:] if prefix else argv
    print(overview(prefix))
    if rest[:1] in (["-h"], ["--help"]):
        return 0
    if rest:
        wrong = shlex.join(argv[:2] if prefix else argv[:1])
        environment.report(f"there is no command {wrong}; choose one of these")
    return 2


def describe_version() -> str:
    """Return the version and, in a checkout, its commit."""
    import dsv3_ref
    from dsv3_ref.training.run_file import git_state

    commit, dirty = git_state()
    state = f" ({commit[:12]}{', with changes' if dirty else ''})" if commit else ""
    return f"dsv3-ref {dsv3_ref.__version__}{state}"


def overview(prefix: str = "") -> str:
    """Return the usage and a line per command, in groups; only names that begin with `prefix`."""
    lines = [f"usage: dsv3 {prefix}COMMAND [OPTIONS]", ""]
    width = max(map(len, BY_NAME))
    for title, group in COMMANDS.items():
        rows = [
            f"  {name:{width}}  {command.summary}"
            for name, command in group.items()
            if name.startswith(prefix)
        ]
        if rows:
            lines += [title, *rows, ""]
    lines += [
        "dsv3 COMMAND --help lists the options of a command; dsv3 COMMAND --config FILE reads them",
        "from a YAML or JSON file, such as the run.json of a run.",
    ]
    return "\n".join(lines)


def exit_now(code: int) -> NoReturn:
    """End the process at once: Python's own end may hang after Parquet (apache/arrow#50482)."""
    os._exit(code)


if __name__ == "__main__":
    main()
