"""A run, watched while it happens: curves that grow, and buttons that pause, stop and resume it.

The run is a `dsv3` command in a process of its own, so the page stays responsive; what is drawn
comes from its `metrics.jsonl`, here or on another machine.
"""

import asyncio
import atexit
import io
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from html import escape
from itertools import chain, count
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dsv3_ref.config import UserError
from dsv3_ref.viz import rl, training
from dsv3_ref.viz.style import in_notebook, show
from dsv3_ref.viz.training import as_row, has

EVERY = 1.0  # seconds between two looks
ENDS = {0: "finished", 75: "stopped", 143: "stopped", -signal.SIGUSR1: "stopped"}  # exit codes
PANELS = {  # title → (key that a row must have, figure of (rows, layer))
    "Reward": ("reward", lambda rows, _: rl.rewards(rows)),
    "Watch": ("kl_k1", lambda rows, _: rl.watched(rows)),
    "Loss": ("loss", lambda rows, _: training.loss_curves(rows)),
    "Experts": ("expert_load", lambda rows, layer: training.load_heatmap(rows, layer)),
    "Balance": ("max_vio", lambda rows, _: training.max_vio(rows)),
    "Gradient": ("grad_norm", lambda rows, _: training.grad_norm(rows)),
    "Speed": ("tokens_per_s", lambda rows, _: training.throughput(rows)),
}


# ── Rows as they come ──


class Tail:
    """The rows of a growing `metrics.jsonl`: of a run's folder, a file, or an http(s) address."""

    def __init__(self, source: Path | str):
        self.path = str(source)
        self.remote = self.path.startswith(("http://", "https://"))
        if not self.path.endswith(".jsonl"):
            self.path = self.path.rstrip("/") + "/metrics.jsonl"
        self.forget()

    def forget(self) -> None:
        """Start from the first byte again."""
        self.offset = 0  # bytes read
        self.line = b""  # the last line of them
        self.rows: dict[int, dict] = {}  # by step

    def read(self) -> list[dict]:
        """Return all rows so far, by step; only what is new is fetched."""
        new = self.fetch(self.offset - len(self.line))
        if not new.startswith(self.line):  # cut by a run that went back: from the start again
            self.forget()
            new = self.fetch(0)
        lines = new[len(self.line) : new.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            self.offset += len(line)
            self.line = line
            if (row := as_row(line)) is not None:
                self.rows[row["step"]] = row
        return [self.rows[step] for step in sorted(self.rows)]

    def fetch(self, start: int) -> bytes:
        """Return the bytes from `start` to the end; none if there are none yet."""
        try:
            if self.remote:
                return fetch(self.path, start)
            with open(self.path, "rb") as f:
                f.seek(start)
                return f.read()
        except OSError:  # not there, or not now
            return b""


def fetch(address: str, start: int) -> bytes:
    """Return the bytes of an address from `start` to the end; the server need not know ranges."""
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read() if answer.status == 206 else answer.read()[start:]
    except urllib.error.HTTPError as e:
        with e:
            if e.code == 416:  # nothing stands there yet
                return b""
        raise


# ── A command of its own ──


class Command:
    """A `dsv3` command in a process of its own, which can pause, stop and resume."""

    def __init__(self, words: str, folder: Path):
        self.words = shlex.split(words)
        self.requested_folder, self.folder = Path(folder), Path(folder)
        self.process: subprocess.Popen | None = None
        self.paused = False

    @property
    def state(self) -> str:
        """One of ready, running, paused, stopped, finished and failed."""
        if self.process is None:
            return "ready"
        if self.process.poll() is None:
            return "paused" if self.paused else "running"
        return ENDS.get(self.process.returncode, "failed")

    def start(self) -> None:
        """Start in the first free folder of that name, or resume."""
        if self.state in ("ready", "finished", "failed"):
            self.folder = free(self.requested_folder)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        again = (self.folder / "run.json").is_file()
        words = [self.words[0], "--resume"] if again else self.words
        argv = [sys.executable, "-m", "dsv3_ref", *words, "--out", str(self.folder)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        atexit.register(self.end)

    @property
    def log(self) -> Path:
        """The file of what the process prints."""
        return self.folder / "logs" / "output.txt"

    def pause(self) -> None:
        """Pause the process, which stays in memory."""
        if self.state == "running":
            self.process.send_signal(signal.SIGSTOP)
            self.paused = True

    def go_on(self) -> None:
        """Let the process continue after a pause."""
        if self.state == "paused":
            self.process.send_signal(signal.SIGCONT)
            self.paused = False

    def stop(self) -> None:
        """End after the running step, with a checkpoint."""
        self.go_on()
        if self.state == "running":
            self.process.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        """Terminate the process."""
        self.go_on()
        if self.state == "running":
            self.process.terminate()

    def last_words(self) -> str:
        """Return the last line that the process printed."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        return (text.replace("\r", "\n").strip().splitlines() or [""])[-1]


def free(folder: Path) -> Path:
    """Return the first of name, name-2, … that is empty or holds a run that is not finished."""
    names = (folder.with_name(f"{folder.name}-{i}") for i in count(2))
    return next(f for f in chain([folder], names) if usable(f))


def usable(folder: Path) -> bool:
    """Return whether a run may start or resume in a folder."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return "summary.json" not in names and ("run.json" in names or names <= {"logs", "run.part"})


# ── The page ──


def picture(fig: Figure) -> bytes:
    """Return a figure as PNG, and close it."""
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=80)
    plt.close(fig)
    return out.getvalue()


def status(rows: list[dict]) -> str:
    """Return a line with the step, loss, reward and speed of a run."""
    if not rows:
        return "no step yet"
    row, parts = rows[-1], [f"step {rows[-1]['step']:,}"]
    for key, form in (("loss", "loss {:.3f}"), ("reward", "reward {:.2f}"),
                      ("tokens_per_s", "{:,.0f} tokens/s")):  # fmt: skip
        if row.get(key) is not None:
            parts.append(form.format(row[key]))
    return " · ".join(parts)


class Dashboard:
    """Tabs of curves over a run's rows; the one that is looked at grows with them."""

    def __init__(self, source: Path | str):
        from ipywidgets import HTML, Dropdown, Tab, VBox

        self.tail = Tail(source)
        self.rows: list[dict] = []
        self.titles: list[str] = []
        self.line, self.tabs = HTML(), Tab()
        self.layer = Dropdown(options=[("first MoE layer", 0)], description="layer")
        self.box = VBox([self.line, self.tabs, self.layer])
        self.tabs.observe(lambda _: self.draw(), "selected_index")
        self.layer.observe(lambda _: self.draw(), "value")
        self.update()

    def update(self, state: str = "") -> None:
        """Read, and draw if there is more."""
        rows = self.tail.read()
        words = " · ".join(x for x in (state, status(rows)) if x)
        self.line.value = f"<b role='status'>{escape(words)}</b>"
        if rows != self.rows:
            self.rows = rows
            self.lay_out()
            self.draw()

    def lay_out(self) -> None:
        """Make a tab for every panel that the rows allow."""
        from ipywidgets import Image

        titles = [title for title, (key, _) in PANELS.items() if has(self.rows, key)]
        if titles != self.titles:
            self.titles = titles
            self.tabs.children = [Image() for _ in titles]
            self.tabs.titles = titles
            self.tabs.selected_index = 0 if titles else None
        layers = len(next((row["expert_load"] for row in self.rows if row.get("expert_load")), []))
        if layers and len(self.layer.options) != layers:
            self.layer.options = [(f"MoE layer {i}", i) for i in range(layers)]

    def draw(self) -> None:
        """Draw the selected tab."""
        tab = self.tabs.selected_index
        experts = tab is not None and self.titles[tab : tab + 1] == ["Experts"]
        self.layer.layout.display = None if experts else "none"
        if tab is not None and self.rows and tab < len(self.titles):
            _, plot = PANELS[self.titles[tab]]
            self.tabs.children[tab].value = picture(plot(self.rows, self.layer.value or 0))

    async def follow(
        self, state: Callable[[], str] = lambda: "", alive: Callable[[], bool] = lambda: True
    ) -> None:
        """Update every second while `alive()`, and once more; `state()` begins the status line."""
        while alive():
            self.update(state())
            await asyncio.sleep(EVERY)
        self.update(state())


class Control:
    """Buttons over a command, above its dashboard."""

    def __init__(self, command: Command):
        from ipywidgets import HTML, Button, HBox, VBox

        self.command = command
        self.task: asyncio.Future | None = None
        self.begin, self.pause, self.stop = (
            Button(description=text, icon=icon)
            for text, icon in (("start", "play"), ("pause", "pause"), ("stop", "stop"))
        )
        self.begin.on_click(lambda _: self.started())
        self.pause.on_click(lambda _: self.paused())
        self.stop.on_click(lambda _: self.stopped())
        self.said, self.place = HTML(), VBox()
        self.box = VBox([HBox([self.begin, self.pause, self.stop]), self.said, self.place])
        self.refresh()

    def refresh(self) -> str:
        """Make the buttons fit the state, and return the state."""
        state = self.command.state
        going = state in ("running", "paused")
        self.begin.disabled = going
        self.pause.disabled = self.stop.disabled = not going
        self.begin.description = "resume" if state == "stopped" else "start"
        self.pause.description = "go on" if state == "paused" else "pause"
        words = self.command.last_words() if state == "failed" else str(self.command.folder)
        self.said.value = f"<span>{escape(state)}: {escape(words)}</span>"
        return state

    def started(self) -> None:
        """Start or resume the command, and follow it."""
        self.command.start()
        board = Dashboard(self.command.folder)
        self.place.children = [board.box]

        def is_alive() -> bool:
            return self.command.state in ("running", "paused")

        self.task = asyncio.ensure_future(board.follow(self.refresh, is_alive))
        self.refresh()

    def paused(self) -> None:
        """Pause the command, or let it continue."""
        if self.command.paused:
            self.command.go_on()
        else:
            self.command.pause()
        self.refresh()

    def stopped(self) -> None:
        """Stop the command after its step."""
        self.command.stop()
        self.refresh()


# ── For notebooks ──


def train(words: str = "train --config tiny", folder: Path | str = "runs/lab") -> Control | None:
    """Show buttons that run a `dsv3` command, and its curves; a script only prints the command."""
    if not in_notebook():
        print(f"dsv3 {words} --out {folder}")
        return None
    from IPython.display import display

    control = Control(Command(words, Path(folder)))
    display(control.box)
    return control


def watch(source: Path | str) -> Dashboard | None:
    """Follow a run (its folder, its metrics.jsonl or the address of one); a script draws it."""
    if not in_notebook():
        look(source)
        return None
    from IPython.display import display

    board = Dashboard(source)
    board.task = asyncio.ensure_future(board.follow())
    display(board.box)
    return board


def look(source: Path | str) -> None:
    """Show the curves of a run as plain figures, for pages without a kernel."""
    rows = Tail(source).read()
    if not rows:
        raise UserError(f"{source} has no rows of a run")
    for key, plot in PANELS.values():
        if has(rows, key):
            show(plot(rows, 0))
