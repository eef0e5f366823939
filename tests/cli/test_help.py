"""`dsv3 --help`, `dsv3 --version`, and the help of every command: a sentence for each option."""

import argparse
import re
import subprocess
import sys
from pkgutil import resolve_name

import pytest
import tyro

import dsv3_ref
from dsv3_ref.cli.commands import BY_NAME, COMMANDS
from dsv3_ref.cli.main import main

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
        "data prepare", "data check", "data bench",
    ]  # fmt: skip
    assert main(["data", "chek"]) == 2
    assert "there is no command data chek" in capsys.readouterr().err


def test_the_places_in_the_table_exist():
    for command in BY_NAME.values():
        for place in filter(None, (command.options, command.function, command.task)):
            resolve_name(place)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dsv3-ref {dsv3_ref.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", dsv3_ref.__version__)


def test_the_overview_imports_no_command():
    code = (
        "import sys; from dsv3_ref.cli import main as cli; cli.main(['--help']);"
        "slow = {'torch', 'tyro', 'dsv3_ref.training.settings'}; sys.exit(str(slow & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"
