"""The dashboard of a run: reading growing metrics, locally and over HTTP; the run's controls."""

import asyncio
import http.server
import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import miniruns
import pytest
from test_viz import closed, fake_rows, rl_rows  # noqa: F401  a fixture

from dsv3_ref.config import UserError
from dsv3_ref.viz import live
from dsv3_ref.viz.live import RunProcess, RunControls, Dashboard, MetricsTail


def text(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture(params=["a folder", "a file", "an address", "an address without ranges"])
def source(request, file):
    """Name the same metrics in every supported way."""
    if not request.param.startswith("an address"):
        yield file.parent if request.param == "a folder" else file
        return
    handler = Ranges if request.param == "an address" else Quiet
    with http.server.HTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=file.parent)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Ranges(Quiet):
    """A server that supports byte ranges, with status 416 for a range beyond the file."""

    def do_GET(self):
        data = Path(self.directory, "metrics.jsonl").read_bytes()
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start < len(data) else 416)
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# ── Rows ──


def test_new_rows_are_read_as_they_are_written(source, file):
    rows, all_ = fake_rows(9), text(fake_rows(9))
    file.write_text("")
    tail = MetricsTail(source)
    assert tail.read() == []
    for end in range(0, len(all_), 700):
        file.write_text(all_[:end])
        assert tail.read() == rows[: all_[:end].count("\n")]
    file.write_text(all_)
    assert tail.read() == rows == tail.read()


def test_a_rolled_back_run_is_read_again(source, file):
    rows = fake_rows(9)
    file.write_text(text(rows))
    tail = MetricsTail(source)
    assert len(tail.read()) == 9
    other = [row | {"loss": 1.0} for row in rows[4:7]]
    file.write_text(text(rows[:4] + other))
    assert tail.read() == rows[:4] + other
    longer = rows[:4] + other + fake_rows(30)[7:]
    file.write_text(text(longer))
    assert tail.read() == longer


def test_only_new_bytes_are_fetched(file, monkeypatch):
    starts, real = [], MetricsTail.fetch
    monkeypatch.setattr(
        MetricsTail, "fetch", lambda self, start: starts.append(start) or real(self, start)
    )
    rows = fake_rows(40)
    file.write_text(text(rows[:30]))
    tail = MetricsTail(file)
    tail.read()
    file.write_text(text(rows))
    tail.read()
    assert starts == [0, len(text(rows[:29]))]


def test_lines_that_are_not_rows_are_skipped(file):
    file.write_text('{"step": 1}\nnonsense\n[2]\n{"loss": 2}\n{"step": 2}\n')
    assert MetricsTail(file).read() == [{"step": 1}, {"step": 2}]


def test_missing_metrics_are_empty(tmp_path):
    assert MetricsTail(tmp_path / "no").read() == [] == MetricsTail("http://127.0.0.1:9/no").read()
    with pytest.raises(UserError, match="holds no metrics"):
        live.show_curves(tmp_path / "no")


# ── The page ──


def images(board) -> list[bytes]:
    return [bytes(child.value) for child in board.tabs.children]


def test_a_dashboard_is_updated_with_its_run(file):
    board = Dashboard(file)
    assert "no step yet" in board.line.value and board.titles == []
    file.write_text(text(fake_rows(20)))
    board.update("running")
    assert board.titles == ["Loss", "Experts", "Balance", "Gradient", "Speed"]
    assert "running · step 20 · loss" in board.line.value
    first = images(board)
    assert first[0].startswith(b"\x89PNG") and not any(first[1:])  # only the selected tab
    board.update()
    assert images(board) == first
    file.write_text(text(fake_rows(40)))
    board.update()
    assert images(board)[0] != first[0]


def test_a_tab_or_layer_is_drawn_when_it_is_selected(file):
    file.write_text(text(fake_rows(20)))
    board = Dashboard(file)
    board.tabs.selected_index = 1
    shown = images(board)[1]
    assert shown and [value for _, value in board.layer.options] == [0, 1, 2]
    board.layer.value = 2
    assert images(board)[1] != shown


def test_an_rl_run_shows_its_reward_first(file):
    file.write_text(text(rl_rows(20)))
    board = Dashboard(file)
    assert board.titles[:3] == ["Reward", "Watch", "Loss"] and images(board)[0]
    assert "reward 0." in board.line.value


def test_following_ends_with_the_last_row(file):
    file.write_text(text(fake_rows(3)))
    board, looks = Dashboard(file), iter([True, False])

    def is_alive():
        file.write_text(text(fake_rows(5)))
        return next(looks)

    asyncio.run(board.follow(lambda: "finished", is_alive))
    assert "finished · step 5" in board.line.value


def test_a_script_draws_figures_or_prints_the_command(file, capsys):
    file.write_text(text(fake_rows(20)))
    assert live.watch(file) is None
    assert live.launch_run("train --steps 3", "runs/x") is None
    assert capsys.readouterr().out == "dsv3 train --steps 3 --out runs/x\n"


def test_a_run_is_found_from_the_repository_and_a_missing_one_is_named(tmp_path, monkeypatch):
    run = tmp_path / "runs/mine"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(text(fake_rows(3)))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert live.find_run("runs/mine") == run
    assert live.find_run("https://host/metrics.jsonl") == "https://host/metrics.jsonl"
    with pytest.raises(UserError, match=r"runs/tiny does not exist; runs here: .*runs/mine"):
        live.watch("runs/tiny")


# ── A command ──


def command(home, out, steps: int) -> RunProcess:
    _, *words = miniruns.options(home, out)[:-2]
    words = [w for w in words if w not in ("--out", str(out))]
    more = ["--steps", str(steps), "--warmup-steps", "2", "--save-every", "1000"]
    return RunProcess(" ".join(["train", *miniruns.override(words, more)]), out)


def until(happens, run: RunProcess, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end and run.state != "failed", run.log.read_text()[-2000:]
        time.sleep(0.05)


def steps(folder) -> int:
    return len(MetricsTail(folder).read())


def test_a_run_is_paused_stopped_and_resumed(home, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = command(home, tmp_path / "run", 5000)
    assert run.state == "ready"
    run.start()
    until(lambda: steps(run.folder) > 3, run)
    run.pause()
    time.sleep(0.3)  # a row may be half written
    num_steps = steps(run.folder)
    assert run.state == "paused"
    time.sleep(0.5)
    assert steps(run.folder) == num_steps
    run.unpause()
    until(lambda: steps(run.folder) > num_steps, run)
    run.pause()
    run.stop()  # also from a pause
    until(lambda: run.state == "stopped", run)
    assert len(list((run.folder / "checkpoints").iterdir())) == 1
    num_steps = steps(run.folder)
    run.start()
    until(lambda: steps(run.folder) > num_steps, run)
    run.end()
    until(lambda: run.state == "stopped", run)


def test_a_finished_run_is_not_overwritten(home, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "summary.json").write_text("{}")
    assert live.next_folder(tmp_path / "run") == tmp_path / "run-3"
    assert live.next_folder(tmp_path / "my-run") == tmp_path / "my-run"
    (tmp_path / "run-3").mkdir()
    (tmp_path / "run-3" / "mine.txt").write_text("files of something else")
    assert live.next_folder(tmp_path / "run") == tmp_path / "run-4"


def test_buttons_follow_the_state_and_a_failure_shows_its_error(home, tmp_path):
    control = RunControls(RunProcess("train --steps -1", tmp_path / "run"))

    def able() -> list[bool]:
        buttons = (control.start_button, control.pause_button, control.stop_button)
        return [not button.disabled for button in buttons]

    assert able() == [True, False, False] and "ready" in control.message.value

    async def click():
        control.start_button.click()
        assert able() == [False, True, True]
        await control.task

    asyncio.run(click())
    assert able() == [True, False, False]
    assert "failed" in control.message.value and "--steps must be" in control.message.value


def test_a_signal_before_the_handler_is_set_stops_the_run_too(tmp_path, monkeypatch):
    run = RunProcess("train", tmp_path / "run")
    run.start()
    os.kill(run.process.pid, live.signal.SIGUSR1)
    until(lambda: run.state != "running", run)
    assert run.state == "stopped"
