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
from html import escape
from itertools import chain, count
from pathlib import Path

import matplotlib.pyplot as plt

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

    def __init__(self, source):
        self.path = str(source)
        self.remote = self.path.startswith(("http://", "https://"))
        if not self.path.endswith(".jsonl"):
            self.path = self.path.rstrip("/") + "/metrics.jsonl"
        self.forget()

    def forget(self) -> None:
        self.at, self.line, self.rows = 0, b"", {}  # bytes read, the last line of them, by step

    def read(self) -> list[dict]:
        """All rows so far, by step; only what is new is fetched."""
        new = self.fetch(self.at - len(self.line))
        if not new.startswith(self.line):  # cut by a run that went back: from the start again
            self.forget()
            new = self.fetch(0)
        lines = new[len(self.line) : new.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            self.at, self.line = self.at + len(line), line
            if (row := as_row(line)) is not None:
                self.rows[row["step"]] = row
        return [self.rows[step] for step in sorted(self.rows)]

    def fetch(self, start: int) -> bytes:
        """What stands from a byte on; nothing if there is nothing yet."""
        try:
            if self.remote:
                return fetch(self.path, start)
            with open(self.path, "rb") as f:
                f.seek(start)
                return f.read()
        except OSError:  # not there, or not now
            return b""


def fetch(address: str, start: int) -> bytes:
    """Bytes of an address from one on; from a server that knows no ranges, all of them."""
    asked = urllib.request.Request(address, headers={"Range": f"bytes={start}-"})
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return answer.read() if answer.status == 206 else answer.read()[start:]
    except urllib.error.HTTPError as e:
        with e:
            if e.code == 416:  # nothing stands there yet
                return b""
        raise


# ── A command of its own ──


class Command:
    """`dsv3 …` in a process that signals pause and end, and that goes on where it stood."""

    def __init__(self, words: str, folder: Path):
        self.words, self.wanted, self.folder = shlex.split(words), Path(folder), Path(folder)
        self.process, self.paused = None, False

    @property
    def state(self) -> str:
        """ready, running, paused, stopped, finished, or failed."""
        if self.process is None:
            return "ready"
        if self.process.poll() is None:
            return "paused" if self.paused else "running"
        return ENDS.get(self.process.returncode, "failed")

    def start(self) -> None:
        """Begin, in the first folder of that name that is free, or go on."""
        if self.state in ("ready", "finished", "failed"):
            self.folder = free(self.wanted)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        again = (self.folder / "run.json").is_file()
        words = [self.words[0], "--resume"] if again else self.words
        argv = [sys.executable, "-m", "dsv3_ref", *words, "--out", str(self.folder)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        atexit.register(self.end)

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "output.txt"

    def pause(self) -> None:
        """Stand still, in memory."""
        if self.state == "running":
            self.process.send_signal(signal.SIGSTOP)
            self.paused = True

    def go_on(self) -> None:
        """After a pause."""
        if self.state == "paused":
            self.process.send_signal(signal.SIGCONT)
            self.paused = False

    def stop(self) -> None:
        """End after the running step, with a checkpoint."""
        self.go_on()
        if self.state == "running":
            self.process.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        """Nobody watches any more."""
        self.go_on()
        if self.state == "running":
            self.process.terminate()

    def last_words(self) -> str:
        """The last line of what it printed."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        return (text.replace("\r", "\n").strip().splitlines() or [""])[-1]


def free(folder: Path) -> Path:
    """One that is empty, or holds a run that is not finished: name, name-2, …"""
    names = (folder.with_name(f"{folder.name}-{i}") for i in count(2))
    return next(f for f in chain([folder], names) if usable(f))


def usable(folder: Path) -> bool:
    """Whether a run may begin here, or go on."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return "summary.json" not in there and ("run.json" in there or there <= {"logs", "run.part"})


# ── The page ──


def picture(fig) -> bytes:
    """A figure as PNG; it is closed."""
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=80)
    plt.close(fig)
    return out.getvalue()


def status(rows: list[dict]) -> str:
    """Where a run stands, in a line."""
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

    def __init__(self, source):
        from ipywidgets import HTML, Dropdown, Tab, VBox

        self.tail, self.seen, self.titles = Tail(source), [], []
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
        if rows != self.seen:
            self.seen = rows
            self.lay_out()
            self.draw()

    def lay_out(self) -> None:
        """A tab for every panel that the rows allow."""
        from ipywidgets import Image

        titles = [title for title, (key, _) in PANELS.items() if has(self.seen, key)]
        if titles != self.titles:
            self.titles = titles
            self.tabs.children = [Image() for _ in titles]
            self.tabs.titles = titles
            self.tabs.selected_index = 0 if titles else None
        layers = len(next((row["expert_load"] for row in self.seen if row.get("expert_load")), []))
        if layers and len(self.layer.options) != layers:
            self.layer.options = [(f"MoE layer {i}", i) for i in range(layers)]

    def draw(self) -> None:
        """The tab that is looked at."""
        at = self.tabs.selected_index
        experts = at is not None and self.titles[at : at + 1] == ["Experts"]
        self.layer.layout.display = None if experts else "none"
        if at is not None and self.seen and at < len(self.titles):
            _, plot = PANELS[self.titles[at]]
            self.tabs.children[at].value = picture(plot(self.seen, self.layer.value or 0))

    async def follow(self, state=lambda: "", alive=lambda: True) -> None:
        """Look again every second, as long as something may come."""
        while alive():
            self.update(state())
            await asyncio.sleep(EVERY)
        self.update(state())


class Control:
    """Buttons over a command, above its dashboard."""

    def __init__(self, command: Command):
        from ipywidgets import HTML, Button, HBox, VBox

        self.command, self.task = command, None
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
        """Buttons that fit the state, which is returned."""
        state = self.command.state
        going = state in ("running", "paused")
        self.begin.disabled, self.pause.disabled, self.stop.disabled = going, not going, not going
        self.begin.description = "resume" if state == "stopped" else "start"
        self.pause.description = "go on" if state == "paused" else "pause"
        words = self.command.last_words() if state == "failed" else str(self.command.folder)
        self.said.value = f"<span>{escape(state)}: {escape(words)}</span>"
        return state

    def started(self) -> None:
        """Begin or go on, and watch it."""
        self.command.start()
        board = Dashboard(self.command.folder)
        self.place.children = [board.box]
        going = lambda: self.command.state in ("running", "paused")
        self.task = asyncio.ensure_future(board.follow(self.refresh, going))
        self.refresh()

    def paused(self) -> None:
        (self.command.go_on if self.command.paused else self.command.pause)()
        self.refresh()

    def stopped(self) -> None:
        self.command.stop()
        self.refresh()


# ── For notebooks ──


def train(words: str = "train --config tiny", folder="runs/lab") -> Control | None:
    """Buttons that run a `dsv3` command, and its curves; a script only says what they would run."""
    if not in_notebook():
        print(f"dsv3 {words} --out {folder}")
        return None
    from IPython.display import display

    control = Control(Command(words, Path(folder)))
    display(control.box)
    return control


def watch(source) -> Dashboard | None:
    """Follow a run (its folder, its metrics.jsonl or the address of one); a script draws it."""
    if not in_notebook():
        look(source)
        return None
    from IPython.display import display

    board = Dashboard(source)
    board.task = asyncio.ensure_future(board.follow())
    display(board.box)
    return board


def look(source) -> None:
    """The same as plain figures, for pages without a kernel."""
    rows = Tail(source).read()
    if not rows:
        raise UserError(f"{source} has no rows of a run")
    for key, plot in PANELS.values():
        if has(rows, key):
            show(plot(rows, 0))
