"""A dashboard of a running `dsv3` command, with buttons to start, pause, stop and resume it.

The command runs in its own process, so the page stays responsive. The curves are read from its
`metrics.jsonl`, which may be on another machine.
"""

import asyncio
import atexit
import io
import os
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

POLL_SECONDS = 1.0  # seconds between updates of a dashboard
MAX_BYTES = 1 << 28  # that a server may send at once
# Windows has no SIGUSR1: there, a run that is stopped ends at once
STOP_SIGNAL = getattr(signal, "SIGUSR1", signal.SIGTERM)
# exit code → state
EXIT_STATES = {0: "finished", 75: "stopped", 143: "stopped", -STOP_SIGNAL: "stopped"}
ACTIVE_STATES = ("running", "paused")
# title → (key that the rows must have, plot of (rows, MoE layer))
PANELS: dict[str, tuple[str, Callable[[list[dict], int], Figure]]] = {
    "Reward": ("reward", lambda rows, _: rl.plot_rewards(rows)),
    "Watch": ("kl_k1", lambda rows, _: rl.plot_rl_metrics(rows)),
    "Loss": ("loss", lambda rows, _: training.plot_loss(rows)),
    "Experts": ("expert_load", lambda rows, layer: training.plot_expert_load(rows, layer)),
    "Balance": ("max_vio", lambda rows, _: training.plot_max_vio(rows)),
    "Gradient": ("grad_norm", lambda rows, _: training.plot_grad_norm(rows)),
    "Speed": ("tokens_per_s", lambda rows, _: training.plot_throughput(rows)),
}


# ── Finding a run ──


def repository_dir() -> Path:
    """Return the nearest folder above the current one that has notebooks: where runs/ is."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "notebooks").is_dir()), here)


def find_run(source: Path | str) -> Path | str:
    """Return the run of this name, from here or from the repository; a URL stays as it is.

    Raise a `UserError` that lists the runs that exist if there is none.
    """
    if str(source).startswith(("http://", "https://")):
        return source
    places = [Path(source), repository_dir() / source]
    run = next((place for place in places if place.exists()), None)
    if run is None:
        runs = sorted(p.parent.as_posix() for p in repository_dir().glob("runs/*/metrics.jsonl"))
        known = f"runs here: {', '.join(runs)}" if runs else "there are no runs here yet"
        raise UserError(f"{source} does not exist; {known}; `dsv3 train --out {source}` starts one")
    return run


# ── Reading metrics ──


class MetricsTail:
    """The rows of a growing `metrics.jsonl`; the source is a run's folder, a file or a URL."""

    def __init__(self, source: Path | str):
        self.path = str(source)
        self.remote = self.path.startswith(("http://", "https://"))
        if not self.path.endswith(".jsonl"):
            self.path = self.path.rstrip("/") + "/metrics.jsonl"
        self.reset()

    def reset(self) -> None:
        """Start from the first byte again."""
        self.offset = 0  # bytes read
        self.last_line = b""  # of the bytes read
        self.rows: dict[int, dict] = {}  # by step

    def read(self) -> list[dict]:
        """Fetch the new bytes and return all rows so far, sorted by step."""
        new = self.fetch(self.offset - len(self.last_line))
        if not new.startswith(self.last_line):  # the run rolled back and rewrote the file
            self.reset()
            new = self.fetch(0)
        lines = new[len(self.last_line) : new.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            self.offset += len(line)
            self.last_line = line
            if (row := as_row(line)) is not None:
                self.rows[row["step"]] = row
        return [self.rows[step] for step in sorted(self.rows)]

    def fetch(self, start: int) -> bytes:
        """Return the bytes from `start` to the end; b"" while the file cannot be read."""
        try:
            if self.remote:
                return fetch_url(self.path, start)
            if not os.path.isfile(self.path):  # a pipe or a device has no end
                return b""
            with open(self.path, "rb") as f:
                f.seek(start)
                return f.read()
        except OSError:  # it cannot be read, or the server does not answer
            return b""


def fetch_url(url: str, start: int) -> bytes:
    """Return the bytes of a URL from `start` to the end, also if the server ignores ranges."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            new = response.read(MAX_BYTES)
            return new if response.status == 206 else new[start:]
    except urllib.error.HTTPError as e:
        with e:
            if e.code == 416:  # the file is not longer than `start`
                return b""
        raise


# ── The process ──


class RunProcess:
    """A `dsv3` command in its own process, which can be paused, stopped and resumed."""

    def __init__(self, words: str, folder: Path):
        self.words = shlex.split(words)
        self.requested_folder, self.folder = Path(folder), Path(folder)
        self.process: subprocess.Popen | None = None
        self.paused = False

    @property
    def state(self) -> str:
        """The state: ready, running, paused, stopped, finished or failed."""
        if self.process is None:
            return "ready"
        if self.process.poll() is None:
            return "paused" if self.paused else "running"
        return EXIT_STATES.get(self.process.returncode, "failed")

    def start(self) -> None:
        """Start in the first usable folder of that name, or resume the stopped run."""
        if self.state in ("ready", "finished", "failed"):
            self.folder = next_folder(self.requested_folder)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        started_before = (self.folder / "run.json").is_file()
        words = [self.words[0], "--resume"] if started_before else self.words
        argv = [sys.executable, "-m", "dsv3_ref", *words, "--out", str(self.folder)]
        if self.log.is_symlink():  # of a stranger's run, to a file elsewhere
            self.log.unlink()
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        atexit.register(self.end)

    @property
    def log(self) -> Path:
        """The file that the process writes its output to."""
        return self.folder / "logs" / "output.txt"

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, which must have been started."""
        assert self.process is not None
        self.process.send_signal(number)

    def pause(self) -> None:
        """Pause the process, except on Windows; it keeps its memory."""
        if self.state == "running" and hasattr(signal, "SIGSTOP"):
            self.send_signal(signal.SIGSTOP)
            self.paused = True

    def unpause(self) -> None:
        """Let a paused process continue."""
        if self.state == "paused":
            self.send_signal(signal.SIGCONT)
            self.paused = False

    def stop(self) -> None:
        """Let the run finish its current step, write a checkpoint and exit."""
        self.unpause()
        if self.state == "running":
            self.send_signal(STOP_SIGNAL)

    def end(self) -> None:
        """Terminate the process."""
        self.unpause()
        if self.state == "running":
            self.send_signal(signal.SIGTERM)

    def last_line(self) -> str:
        """Return the last line that the process printed."""
        text = self.log.read_text(errors="replace", encoding="utf-8") if self.log.is_file() else ""
        return (text.replace("\r", "\n").strip().splitlines() or [""])[-1]


def next_folder(folder: Path) -> Path:
    """Return the first of name, name-2, … in which a run may start or resume."""
    names = (folder.with_name(f"{folder.name}-{i}") for i in count(2))
    return next(f for f in chain([folder], names) if is_usable(f))


def is_usable(folder: Path) -> bool:
    """Return whether a folder is empty or holds an unfinished run."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return "summary.json" not in names and ("run.json" in names or names <= {"logs", "run.part"})


# ── Widgets ──


def to_png(fig: Figure) -> bytes:
    """Render a figure as PNG and close it."""
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=80)
    plt.close(fig)
    return out.getvalue()


def progress_line(rows: list[dict]) -> str:
    """Return a line with the latest step, loss, reward and throughput of a run."""
    if not rows:
        return "no step yet"
    row = rows[-1]
    parts = [f"step {row['step']:,}"]
    for key, template in (("loss", "loss {:.3f}"), ("reward", "reward {:.2f}"),
                      ("tokens_per_s", "{:,.0f} tokens/s")):  # fmt: skip
        if row.get(key) is not None:
            parts.append(template.format(row[key]))
    return " · ".join(parts)


class Dashboard:
    """Tabs of plots of a run's metrics; the selected tab is redrawn as rows arrive."""

    def __init__(self, source: Path | str):
        from ipywidgets import HTML, Dropdown, Tab, VBox

        self.tail = MetricsTail(source)
        self.rows: list[dict] = []
        self.titles: list[str] = []
        self.task: asyncio.Future | None = None  # the updates, see `watch`
        self.line, self.tabs = HTML(), Tab()
        self.layer = Dropdown(options=[("first MoE layer", 0)], description="layer")
        self.box = VBox([self.line, self.tabs, self.layer])
        self.tabs.observe(lambda _: self.draw(), "selected_index")
        self.layer.observe(lambda _: self.draw(), "value")
        self.update()

    def update(self, state: str = "") -> None:
        """Read the metrics, and redraw if there are new rows."""
        rows = self.tail.read()
        text = " · ".join(x for x in (state, progress_line(rows)) if x)
        self.line.value = f"<b role='status'>{escape(text)}</b>"
        if rows != self.rows:
            self.rows = rows
            self.update_tabs()
            self.draw()

    def update_tabs(self) -> None:
        """Create a tab for every panel whose key the rows have."""
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
        is_experts = tab is not None and self.titles[tab : tab + 1] == ["Experts"]
        self.layer.layout.display = None if is_experts else "none"
        if tab is not None and self.rows and tab < len(self.titles):
            _, plot = PANELS[self.titles[tab]]
            self.tabs.children[tab].value = to_png(plot(self.rows, self.layer.value or 0))

    async def follow(
        self, state: Callable[[], str] = lambda: "", is_alive: Callable[[], bool] = lambda: True
    ) -> None:
        """Update every second while `is_alive()`, then once more; the status includes `state()`."""
        while is_alive():
            self.update(state())
            await asyncio.sleep(POLL_SECONDS)
        self.update(state())


class RunControls:
    """Buttons that control a run, above its dashboard."""

    def __init__(self, run: RunProcess):
        from ipywidgets import HTML, Button, HBox, VBox

        self.run = run
        self.task: asyncio.Future | None = None
        self.start_button = Button(description="start", icon="play")
        self.pause_button = Button(description="pause", icon="pause")
        self.stop_button = Button(description="stop", icon="stop")
        self.start_button.on_click(lambda _: self.on_start())
        self.pause_button.on_click(lambda _: self.on_pause())
        self.stop_button.on_click(lambda _: self.on_stop())
        self.message, self.output = HTML(), VBox()
        buttons = HBox([self.start_button, self.pause_button, self.stop_button])
        self.box = VBox([buttons, self.message, self.output])
        self.refresh()

    def refresh(self) -> str:
        """Enable and label the buttons for the current state, and return the state."""
        state = self.run.state
        is_active = state in ACTIVE_STATES
        self.start_button.disabled = is_active
        self.pause_button.disabled = self.stop_button.disabled = not is_active
        self.start_button.description = "resume" if state == "stopped" else "start"
        self.pause_button.description = "continue" if state == "paused" else "pause"
        detail = self.run.last_line() if state == "failed" else str(self.run.folder)
        self.message.value = f"<span>{escape(state)}: {escape(detail)}</span>"
        return state

    def is_active(self) -> bool:
        """Return whether the process exists, running or paused."""
        return self.run.state in ACTIVE_STATES

    def on_start(self) -> None:
        """Start or resume the run, and follow it."""
        self.run.start()
        board = Dashboard(self.run.folder)
        self.output.children = [board.box]
        self.task = asyncio.ensure_future(board.follow(self.refresh, self.is_active))
        self.refresh()

    def on_pause(self) -> None:
        """Pause the run, or let it continue."""
        if self.run.paused:
            self.run.unpause()
        else:
            self.run.pause()
        self.refresh()

    def on_stop(self) -> None:
        """Stop the run after its current step."""
        self.run.stop()
        self.refresh()


# ── For notebooks ──


def launch_run(
    words: str = "train --config tiny", folder: Path | str = "runs/lab"
) -> RunControls | None:
    """Show controls and curves of a `dsv3` command; a script only prints the command."""
    if not in_notebook():
        print(f"dsv3 {words} --out {folder}")
        return None
    from IPython.display import display

    control = RunControls(RunProcess(words, repository_dir() / folder))
    display(control.box)
    return control


def watch(source: Path | str) -> Dashboard | None:
    """Follow a run, given as folder, file or URL of its metrics; a script draws its curves once.

    A relative path is looked up in the current directory, then in the repository. Raise a
    `UserError` if there is no such run.
    """
    source = find_run(source)
    if not in_notebook():
        show_curves(source)
        return None
    from IPython.display import display

    board = Dashboard(source)
    board.task = asyncio.ensure_future(board.follow())
    display(board.box)
    return board


def show_curves(source: Path | str) -> None:
    """Show the curves of a run as static figures."""
    rows = MetricsTail(source).read()
    if not rows:
        raise UserError(f"{source} holds no metrics: name a run, its metrics.jsonl or its URL")
    for key, plot in PANELS.values():
        if has(rows, key):
            show(plot(rows, 0))
