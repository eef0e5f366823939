"""Progress bars that become lines in a file."""

import os
import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines


def is_terminal() -> bool:
    """Return whether stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class ProgressBar(tqdm):
    """A bar of tqdm; where stderr is not a terminal, a line now and then and one at the end."""

    def __init__(self, **options: Any):
        self.is_lines = not is_terminal()
        if self.is_lines:
            lines = {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "ncols": 0}
            options = options | lines
        super().__init__(**options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or print a line."""
        if self.is_lines:
            self.fp.write(f"{msg or self}\n")
        else:
            super().display(msg, pos)

    def close(self) -> None:
        """Draw the bar a last time."""
        if self.is_lines and not self.disable and self.n:
            self.display()
            self.sp = None  # tqdm's close draws nothing more
        super().close()
