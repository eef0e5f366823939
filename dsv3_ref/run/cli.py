"""`dsv3 COMMAND …`: the options come from the dataclasses, by tyro."""

import shlex
import sys

from dsv3_ref.config import UserError


def train(argv: list[str]) -> None:
    """dsv3 train: from text to a checkpoint and a report."""
    from dsv3_ref.run.settings import parse

    args = parse(argv)
    from dsv3_ref.run.train import run  # after --help: it takes seconds to import

    run(args, shlex.join(["dsv3", "train", *argv]))


COMMANDS = {"train": train}


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: dsv3 {{{','.join(COMMANDS)}}} …  (--help after a command lists its options)")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
