"""Stages of a study: `dsv3` commands with a folder each; a finished stage does not run again."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_ref.checkpoints import atomic
from dsv3_ref.config import UserError

CommandRunner = Callable[[list[str]], int]  # arguments after `dsv3` → exit code


def run_in_subprocess(argv: list[str]) -> int:
    """Run a `dsv3` command in a process of its own and return its exit code."""
    return subprocess.call([sys.executable, "-m", "dsv3_ref", *argv])


@dataclass(frozen=True)
class StageRunner:
    """A runner of stages; `run_command` executes a command and returns its exit code."""

    run_command: CommandRunner = run_in_subprocess

    def run(self, out: Path, *words: object) -> Path:
        """Run a command with output folder `out`, or resume it there unless it has finished.

        Returns `out`. Raises `UserError` if `out` belongs to another command.
        """
        argv = [*map(str, words), "--out", str(out)]
        command = shlex.join(["dsv3", *argv])
        started = recorded_command(out)
        if started and started != command:
            raise UserError(f"{out} belongs to another command ({started}): give another --out")
        if (out / "summary.json").is_file():
            return out
        if started:
            argv = [argv[0], "--resume", "--out", str(out)]
        print("\n$ " + shlex.join(["dsv3", *argv]), flush=True)
        if code := self.run_command(argv):
            raise SystemExit(code)
        return out

    def finish_pretraining(self, init: Path) -> None:
        """Resume the run in `init` if it is unfinished; train a tiny model if it is missing."""
        started = recorded_command(init) or ""
        if started.startswith("dsv3 train ") and not (init / "summary.json").is_file():
            self.run_command(["train", "--resume", "--out", str(init)])
        elif not init.exists():
            self.run(init, "train", "--config", "tiny")


def recorded_command(run: Path) -> str | None:
    """Return the command that started the run in a folder; None if there is no run."""
    path = run / "run.json"
    return atomic.read_json(path)["command"] if path.is_file() else None


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    """Write one JSON object per line, in new folders if needed; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def round_significant(x: Any) -> Any:
    """Round every float inside dictionaries and lists to four significant digits."""
    if isinstance(x, dict):
        return {key: round_significant(value) for key, value in x.items()}
    if isinstance(x, list):
        return [round_significant(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x
