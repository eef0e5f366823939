"""Shell completion: a script that knows the names of commands and of their options."""

from dataclasses import fields

from dsv3_ref.cli.commands import BY_NAME
from dsv3_ref.cli.option_groups import OPTION_GROUPS, RECIPE
from dsv3_ref.config import Config, UserError

BASH = """
_dsv3() {{
    local words="${{COMP_WORDS[*]:1:COMP_CWORD-1}}" current="${{COMP_WORDS[COMP_CWORD]}}" options
    case "$words " in
{cases}
        *) options="{commands} --help --version" ;;
    esac
    [[ "$words" && "$current" != -* ]] && options=""
    [[ "$words" == data ]] && options="{data}"
    COMPREPLY=($(compgen -W "$options" -- "$current"))
}}
complete -o default -F _dsv3 dsv3
"""


def completion_script(shell: str) -> str:
    """Return the script that a shell (bash or zsh) reads to complete `dsv3`."""
    if shell not in ("bash", "zsh"):
        raise UserError(f"--print-completion {shell} is unknown: give bash or zsh")
    cases = "\n".join(f'        "{name} "*) options="{flags(name)}" ;;' for name in BY_NAME)
    commands = " ".join(dict.fromkeys(name.split()[0] for name in BY_NAME))
    data = " ".join(name.split()[1] for name in BY_NAME if name.startswith("data "))
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return head + BASH.strip().format(cases=cases, commands=commands, data=data)


def flags(name: str) -> str:
    """Return the options of a command, separated by spaces."""
    groups = OPTION_GROUPS[name]
    names = " ".join(groups.values()).split()
    if "recipe" in names:
        names.remove("recipe")
        names += " ".join(RECIPE.values()).split()
        names += [f"model.{field.name}" for field in fields(Config)]
    names = [*dict.fromkeys([*names, "config", "help"])]
    return " ".join("--" + x.replace("_", "-") for x in names)
