"""`dsv3 COMMAND …`: find the command, parse its options from their dataclass, run it."""

import os
import shlex
from pkgutil import resolve_name
from typing import Any, NoReturn

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

    options = load(command.options)
    registry = grouping_registry({options: OPTION_GROUPS[name]})
    args = tyro.cli(options, prog=f"dsv3 {name}", args=argv, registry=registry)
    function = load(command.function)
    if command.records_command_line:
        function(args, command_line)
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
    config = parse_args(argv, options, registry)
    if world_size() > 1:
        run_task = load("dsv3_ref.parallel.launch.run_on_ranks")
    else:
        run_task = load("dsv3_ref.training.loop.run_in_process")  # takes seconds to import
    run_task(load(command.task)(config), command_line)


def load(place: str) -> Any:
    """Import `package.module.name` and return what it names."""
    return resolve_name(place)


# ── What there is ──


def print_overview(argv: list[str]) -> int:
    """Print the version, or the commands (all, or those of a group); return the exit code."""
    if argv == ["--version"]:
        import dsv3_ref

        print(f"dsv3-ref {dsv3_ref.__version__}")
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
    return "\n".join([*lines, "dsv3 COMMAND --help lists the options of a command."])


def exit_now(code: int) -> NoReturn:
    """End the process at once: Python's own end may hang after Parquet (apache/arrow#50482)."""
    os._exit(code)


if __name__ == "__main__":
    main()
