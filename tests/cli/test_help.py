"""`dsv3 --help`, `dsv3 --version`, and the help of every command: a sentence for each option."""

import argparse
import dataclasses
import re
import subprocess
import sys
from itertools import chain
from pkgutil import resolve_name

import pytest
import tyro

import dsv3_ref
from dsv3_ref.cli.commands import BY_NAME, COMMANDS
from dsv3_ref.cli.main import main
from dsv3_ref.cli.option_groups import OPTION_GROUPS

DEFAULT = re.compile(r"\s*\((default: .*|required|repeatable)\)$", re.DOTALL)


@pytest.fixture
def parser_of(monkeypatch):
    """The argument parser that a command gives its options to."""

    def capture(config, *, prog, args, **default):
        parsers.append(tyro.extras.get_parser(config, prog=prog, **default))
        raise SystemExit(0)

    def parser(name: str) -> argparse.ArgumentParser:
        assert main([*name.split(), "--help"]) == 0
        return parsers.pop()

    parsers = []
    monkeypatch.setattr(tyro, "cli", capture)
    return parser


@pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_every_option_has_a_sentence_and_shows_its_default(name, parser_of):
    """Options of groups (`--model.dim`, those of the recipe) too."""
    options = [a for a in parser_of(name)._actions if "--help" not in a.option_strings]
    assert options
    names = [a.option_strings[0] if a.option_strings else a.dest for a in options]
    texts = dict(zip(names, (a.help or "" for a in options)))
    assert [n for n, text in texts.items() if not DEFAULT.search(text)] == []
    silent = [n for n, text in texts.items() if not re.search("[a-z]", DEFAULT.sub("", text))]
    assert silent == []


def headings(text: str) -> dict[str, list[str]]:
    """Heading → flags. capsys is no UTF-8 terminal: headings are underlined, not framed."""
    listed: dict[str, list[str]] = {}
    lines = text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""]):
        if re.match(r" \S", line) and re.fullmatch(" -+ ?", below):
            flags = listed.setdefault(line.strip(), [])
        elif option := re.match("  (--[a-z][a-z0-9.-]+)", line):
            flags.append(option[1])
    return listed


@pytest.fixture
def help_of(monkeypatch, capsys):
    """What `dsv3 COMMAND --help` lists, by heading."""

    def read(name: str) -> dict[str, list[str]]:
        assert main([*name.split(), "--help"]) == 0
        return headings(capsys.readouterr().out)

    monkeypatch.setenv("COLUMNS", "100")  # a wide terminal has boxes side by side
    return read


@pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_every_option_is_in_a_named_group(name, help_of):
    listed = help_of(name)
    assert listed.pop("options") == []  # only -h, --help
    listed.pop("positional arguments", None)
    options = resolve_name(BY_NAME[name].options)
    flat = tyro.extras.get_parser(options)
    flags = [a.option_strings[0] for a in flat._actions if a.option_strings]
    assert sorted(chain(*listed.values())) == sorted(x for x in flags if x not in ("-h", "--help"))
    assert all(listed.values())
    assert all(heading.endswith(" options") for heading in listed)


def test_the_groups_of_a_training_run(help_of):
    listed = help_of("train")
    assert list(listed) == [
        "options", "model options", "data options", "optimizer options", "loss options",
        "computation options", "parallelism options", "checkpoint options", "logging options",
    ]  # fmt: skip
    for heading, flag in {
        "model": "--model.dim", "data": "--seq-len", "optimizer": "--lr", "loss": "--mtp-weight",
        "computation": "--precision", "parallelism": "--pp", "checkpoint": "--resume",
        "logging": "--log",
    }.items():  # fmt: skip
        assert flag in listed[f"{heading} options"]
    for name in ("extend", "sft", "reward", "rl"):
        assert {*listed} - {"data options"} <= {*help_of(name)}


def test_the_groups_name_fields_that_exist():
    assert set(OPTION_GROUPS) == set(BY_NAME)
    for name, groups in OPTION_GROUPS.items():
        fields = {f.name for f in dataclasses.fields(resolve_name(BY_NAME[name].options))}
        grouped = " ".join(groups.values()).split()
        assert set(grouped) <= fields
        assert len(set(grouped)) == len(grouped)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], []])
def test_the_overview_lists_every_command_with_a_sentence(argv, capsys):
    assert main(argv) == (0 if argv else 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: dsv3 COMMAND [OPTIONS]"
    assert [x for x in lines if x in COMMANDS] == list(COMMANDS)
    listed = dict(re.split("  +", x.strip(), maxsplit=1) for x in lines if x.startswith("  "))
    assert listed == {name: command.summary for name, command in BY_NAME.items()}
    assert all(text[0].isupper() and text.endswith(".") for text in listed.values())


def test_a_group_of_commands_is_listed_by_its_first_word(capsys):
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: dsv3 data COMMAND" in out
    assert [re.split("  +", x)[1] for x in out.splitlines() if x.startswith("  ")] == [
        "data prepare", "data bench",
    ]  # fmt: skip
    assert main(["data", "chek"]) == 2
    assert "there is no command data chek" in capsys.readouterr().err


def test_the_places_in_the_table_exist():
    for command in BY_NAME.values():
        for place in filter(None, (command.options, command.function, command.task)):
            resolve_name(place)


@pytest.mark.parametrize(
    ("state", "more"),
    [
        ((None, None), ""),
        (("0123456789abcdef", False), " (0123456789ab)"),
        (("0123456789abcdef", True), " (0123456789ab, with changes)"),
    ],
    ids=["wheel", "checkout", "edited"],
)
def test_the_version(state, more, monkeypatch, capsys):
    monkeypatch.setattr("dsv3_ref.training.run_file.git_state", lambda: state)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dsv3-ref {dsv3_ref.__version__}{more}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", dsv3_ref.__version__)


def test_the_overview_imports_no_command():
    code = (
        "import sys; from dsv3_ref.cli import main as cli; cli.main(['--help']);"
        "slow = {'torch', 'tyro', 'dsv3_ref.training.settings'};"
        "sys.exit(str(slow & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"
