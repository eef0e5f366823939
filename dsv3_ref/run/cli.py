"""`dsv3 COMMAND …`: the options come from the dataclasses, by tyro."""

import argparse
import errno
import sys

import tyro

from dsv3_ref.config import UserError, named
from dsv3_ref.optim import RECIPES


def train(argv: list[str]) -> None:
    """dsv3 train: `--config` chooses the defaults, every other option changes one field."""
    from dsv3_ref.run.train import Train, run

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="tiny")
    name = first.parse_known_args(argv)[0].config
    default = Train(model=named(name), recipe=RECIPES.get(name, RECIPES["tiny"]), config=name)
    run(tyro.cli(Train, prog="dsv3 train", default=default, args=argv))


COMMANDS = {"train": train}


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: dsv3 {{{','.join(COMMANDS)}}} …  (--help after a command lists its options)")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        print(
            f"error: the disk is full{f' ({e.filename})' if e.filename else ''}; ", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
